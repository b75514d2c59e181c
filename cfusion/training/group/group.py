"""Trains many folds, seeds and models with one pass over the shards per epoch; each result is as if trained separately.

A bag's position in an epoch depends only on its key, so each member's order is a part of the group's order. Each bag is
read, moved and cast once per pass, and handed to the members that train on it or validate with it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from cfusion.config import DataConfig
from cfusion.data.loader import BagSet
from cfusion.data.partition import epoch_order
from cfusion.errors import CfusionError, RequeueError
from cfusion.interruption import stop_requested
from cfusion.training.folds import FoldRun
from cfusion.training.group.group_checkpoint import GroupCheckpoints
from cfusion.training.group.lanes import Lanes
from cfusion.training.group.member import GroupMember, Visit
from cfusion.training.group.order import owners, visits
from cfusion.training.group.wide_passes import visit_wide
from cfusion.training.runtime import Runtime
from cfusion.types import BagBatch

logger = logging.getLogger(__name__)

LONG = 8192
"""Bags with more tiles are processed by one member at a time: their matrices keep all threads busy, and several members
at once would multiply the memory for activations."""

TURN, ROOM = 16, 4 * LONG
"""Maximum number of bags, and of their tiles, that are in memory for members that run side by side."""


@dataclass(frozen=True)
class Group:
    """Members that share one read of the shards.

    Attributes:
        runtime: The processes.
        all_bags: The bags of all members.
        data: How they are read.
        checkpoints: Checkpoints of the group's state.
        done: Called on every rank with a member and its result.
        failed: Called on every rank with a member whose training failed; returns the members that stop with it.
    """

    runtime: Runtime
    all_bags: BagSet
    data: DataConfig
    checkpoints: GroupCheckpoints
    done: Callable[[GroupMember, FoldRun], None]
    failed: Callable[[GroupMember, CfusionError], Sequence[GroupMember]]

    @functools.cached_property
    def lanes(self) -> Lanes | None:
        """Threads for members that train side by side; only on a CPU with several threads and a single process."""
        several = self.runtime.is_one_cpu_process and torch.get_num_threads() > 1
        return Lanes(torch.get_num_threads()) if several else None

    def train(self, members: Sequence[GroupMember]) -> None:
        """Train all members to completion.

        Members found in a checkpoint resume first; the rest start when these are finished.

        Raises:
            RequeueError: The process was asked to stop; the state is saved.
        """
        waiting = list(members)
        try:
            with self.checkpoints.settling():
                while waiting:
                    found, number = self.checkpoints.load(waiting)
                    self._train(found or waiting, number)
                    waiting = [member for member in waiting if member not in found] if found else []
        finally:
            if self.lanes is not None:
                self.lanes.close()

    def _train(self, members: Sequence[GroupMember], number: int) -> None:
        active = list(members)
        while active:
            started = time.monotonic()
            self._pass(active, number)
            self.checkpoints.settle()  # before members finish, whose folders it may be in
            for member in list(active):
                if member not in active:
                    continue
                with self._failing(member, active):
                    result = member.conclude(time.monotonic() - started)
                    if result is not None:
                        self.done(member, result)
                        active.remove(member)
            number += 1
        if members:
            self.checkpoints.clear()

    def _pass(self, active: list[GroupMember], number: int) -> None:
        """Finish one pass; members that fail are removed from `active`."""
        all_bags, world = self.all_bags, self.runtime.world_size
        places = epoch_order([bag.key for bag in all_bags.bags], seed=self.data.order_seed, epoch=number)
        order = visits([bags for member in active for bags in (member.learns, member.shown)], places)
        window = max(member.fold.job.config.parallel.global_batch for member in active)
        owner = owners(order, all_bags.costs, world, window)
        mine = set(order[owner == self.runtime.rank].tolist())
        for member in active:
            member.begin(order, mine)
        with contextlib.closing(self._delivered(active, [b for b in order.tolist() if b in mine], number)) as bags:
            for visited in self._in_turns(order.tolist()):
                shown = [Visit(seen, bag, *(next(bags) if bag in mine else (None, None))) for seen, bag in visited]
                self._hand_out(active, shown)
                seen = shown[-1].seen
                if world == 1 or seen % window == 0 or seen == len(order):
                    self._save(active, number, seen)

    def _in_turns(self, order: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield the bags handed out at once, each with the number of bags of the order processed after it."""
        turn, tiles = list[tuple[int, int]](), 0
        for seen, bag in enumerate(order, 1):
            size = ROOM if self._one_by_one(bag) else sum(self.all_bags.bags[bag].tiles.values())
            if turn and (len(turn) == TURN or tiles + size > ROOM):
                yield turn
                turn, tiles = [], 0
            turn.append((seen, bag))
            tiles += size
        if turn:
            yield turn

    def _one_by_one(self, bag: int) -> bool:
        """Whether members process a bag one after the other."""
        return self.lanes is None or sum(self.all_bags.bags[bag].tiles.values()) > LONG

    def _delivered(
        self, active: Sequence[GroupMember], bags: Sequence[int], number: int
    ) -> Generator[tuple[BagBatch | None, BagBatch | None]]:
        """Yield each of this rank's bags as sampled for training, and unchanged; None where no member needs it."""
        learnt = {bag for bag in bags if any(member.wants(bag) for member in active)}
        shown = {bag for bag in bags if any(member.misses(bag) for member in active)}

        def stream(wanted: set[int], *, training: bool) -> Iterator[BagBatch]:
            chosen = [[bag] for bag in bags if bag in wanted]
            return self.all_bags.loader.stream(chosen, epoch=number, training=training)

        if self.data.max_tiles is None and not self.data.feature_dropout:
            needed = learnt | shown
            both = stream(needed, training=True)
            for bag in bags:
                batch = next(both) if bag in needed else None
                yield batch, batch
            return
        sampled, plain = stream(learnt, training=True), stream(shown, training=False)
        for bag in bags:
            yield next(sampled) if bag in learnt else None, next(plain) if bag in shown else None

    def _hand_out(self, active: list[GroupMember], turn: Sequence[Visit]) -> None:
        wide = any(member.fold.job.config.train.wide_folds for member in active)
        if self.lanes is not None and not wide and not self._one_by_one(turn[0].bag):
            failed = self.lanes.run({member: map(member.visit, turn) for member in active})
            for member, error in failed.items():
                if member in active or not isinstance(error, CfusionError):
                    with self._failing(member, active):
                        raise error
            return
        for visit in turn:
            visit_wide(self.runtime, active, visit)
            for member in list(active):
                if member in active:
                    with self._failing(member, active):
                        member.visit(visit)

    def _save(self, active: Sequence[GroupMember], number: int, seen: int) -> None:
        """Write a checkpoint if one is due; after a signal, write it and stop.

        Raises:
            RequeueError: The process was asked to stop.
        """
        stop = self.runtime.sum([float(stop_requested())])[0] > 0
        self.checkpoints.save(active, number, seen, now=stop)
        if stop:
            raise RequeueError(
                f"Stopped in pass {number}; the state of the folds is in {self.checkpoints.folder}.",
                "Run the same command again to resume.",
            )

    @contextlib.contextmanager
    def _failing(self, member: GroupMember, active: list[GroupMember]) -> Iterator[None]:
        """Keep the other members training if one fails."""
        try:
            yield
        except CfusionError as error:
            for stopped in self.failed(member, error):
                if stopped in active:
                    active.remove(stopped)
