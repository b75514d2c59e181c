"""Training of many folds, seeds and models from one pass over the shards an epoch, each as if it were alone.

The place of a bag in an epoch follows from its own key, so the order of each member is a part of the group's. Every
bag is read, moved and cast once a pass, and handed to the members that train on it or are judged by it.
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
from cfusion.training.folds import FoldRun
from cfusion.training.group.group_checkpoint import GroupCheckpoints
from cfusion.training.group.lanes import Lanes
from cfusion.training.group.member import GroupMember, Visit
from cfusion.training.group.order import owners, visits
from cfusion.training.interruption import stop_requested
from cfusion.training.runtime import Runtime
from cfusion.types import BagBatch

logger = logging.getLogger(__name__)

LONG = 8192
"""Bags of more tiles are taken by one member after the other: their matrices keep all threads busy by themselves, and
what a model holds of them is not to be there several times."""

TURN, ROOM = 16, 4 * LONG
"""Most bags, and most tiles of them, that are in memory for members to take side by side."""


@dataclass(frozen=True)
class Group:
    """Members that share one read.

    Attributes:
        runtime: The processes.
        whole: The bags of all members.
        data: How they are read.
        checkpoints: Where the group's state goes.
        done: Called on every rank with a member and its result.
        failed: Called on every rank with a member whose training cannot go on; returns those that stop with it.
    """

    runtime: Runtime
    whole: BagSet
    data: DataConfig
    checkpoints: GroupCheckpoints
    done: Callable[[GroupMember, FoldRun], None]
    failed: Callable[[GroupMember, CfusionError], Sequence[GroupMember]]

    @functools.cached_property
    def lanes(self) -> Lanes | None:
        """Where members train side by side: on a CPU with several threads, where no other process waits for a step."""
        alone = self.runtime.world_size == 1 and self.runtime.device.type == "cpu"
        return Lanes(torch.get_num_threads()) if alone and torch.get_num_threads() > 1 else None

    def train(self, members: Sequence[GroupMember]) -> None:
        """Train all members to their end.

        Those that a checkpoint knows go on from it; the others follow when these are done.

        Raises:
            RequeueError: The process was asked to stop; the state is saved.
        """
        waiting = list(members)
        try:
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
        """What is left of one pass; members that fail leave `active`."""
        whole, world = self.whole, self.runtime.world_size
        places = epoch_order([bag.key for bag in whole.bags], seed=self.data.order_seed, epoch=number)
        order = visits([bags for member in active for bags in (member.learns, member.shown)], places)
        window = max(member.fold.job.config.parallel.global_batch for member in active)
        owner = owners(order, whole.costs, world, window)
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
        """Bags that are handed out at once, with how many of the order are behind after each."""
        turn, tiles = list[tuple[int, int]](), 0
        for seen, bag in enumerate(order, 1):
            size = ROOM if self._alone(bag) else sum(self.whole.bags[bag].tiles.values())
            if turn and (len(turn) == TURN or tiles + size > ROOM):
                yield turn
                turn, tiles = [], 0
            turn.append((seen, bag))
            tiles += size
        if turn:
            yield turn

    def _alone(self, bag: int) -> bool:
        """Whether members take a bag one after the other."""
        return self.lanes is None or sum(self.whole.bags[bag].tiles.values()) > LONG

    def _delivered(
        self, active: Sequence[GroupMember], bags: Sequence[int], number: int
    ) -> Generator[tuple[BagBatch | None, BagBatch | None]]:
        """Each of this rank's bags as training sees it, and as it is; None where nobody needs it."""
        learnt = {bag for bag in bags if any(member.wants(bag) for member in active)}
        shown = {bag for bag in bags if any(member.misses(bag) for member in active)}

        def stream(wanted: set[int], *, training: bool) -> Iterator[BagBatch]:
            chosen = [[bag] for bag in bags if bag in wanted]
            return self.whole.loader.stream(chosen, epoch=number, training=training)

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
        if self.lanes is not None and not self._alone(turn[0].bag):
            failed = self.lanes.run({member: map(member.visit, turn) for member in active})
            for member, error in failed.items():
                if member in active or not isinstance(error, CfusionError):
                    with self._failing(member, active):
                        raise error
            return
        for visit in turn:
            for member in list(active):
                if member in active:
                    with self._failing(member, active):
                        member.visit(visit)

    def _save(self, active: Sequence[GroupMember], number: int, seen: int) -> None:
        """Write a checkpoint now and then, and where a signal asks for it, leave.

        Raises:
            RequeueError: The process was asked to stop.
        """
        stop = self.runtime.sum([float(stop_requested())])[0] > 0
        self.checkpoints.save(active, number, seen, now=stop)
        if stop:
            raise RequeueError(
                f"Stopped in pass {number}; the state of the folds is in {self.checkpoints.folder}.",
                "The same command goes on from there.",
            )

    @contextlib.contextmanager
    def _failing(self, member: GroupMember, active: list[GroupMember]) -> Iterator[None]:
        """Where a member's training cannot go on, the others do."""
        try:
            yield
        except CfusionError as error:
            for stopped in self.failed(member, error):
                if stopped in active:
                    active.remove(stopped)
