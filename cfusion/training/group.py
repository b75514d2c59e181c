"""Training of many folds, seeds and models from one pass over the shards an epoch, each as if it were alone.

The place of a bag in an epoch follows from its own key, so the order of each member is a part of the group's. Every
bag is read, moved and cast once a pass, and handed to the members that train on it or are judged by it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from cfusion.config import DataConfig
from cfusion.data.partition import epoch_order
from cfusion.errors import CfusionError, RequeueError
from cfusion.training.folds import FoldRun
from cfusion.training.group_checkpoint import GroupCheckpoints
from cfusion.training.group_member import Member
from cfusion.training.group_plan import owners, visits
from cfusion.training.inference import BagSet
from cfusion.training.interruption import stop_requested
from cfusion.training.runtime import Runtime
from cfusion.types import BagBatch

logger = logging.getLogger(__name__)


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
    done: Callable[[Member, FoldRun], None]
    failed: Callable[[Member, CfusionError], Sequence[Member]]

    def train(self, members: Sequence[Member]) -> None:
        """Train all members to their end.

        Those that a checkpoint knows go on from it; the others start when these are done.

        Raises:
            RequeueError: The process was asked to stop; the state is saved.
        """
        there, number = self.checkpoints.load(members)
        self._train(there, number)
        self._train([member for member in members if member not in there], 0)

    def _train(self, members: Sequence[Member], number: int) -> None:
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

    def _pass(self, active: list[Member], number: int) -> None:
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
            for seen, bag in enumerate(order.tolist(), 1):
                if bag in mine:
                    self._hand_out(active, bag, *next(bags))
                for member in [member for member in active if member.is_due(seen)]:
                    if member in active:
                        with self._failing(member, active):
                            member.step()
                if world == 1 or seen % window == 0 or seen == len(order):
                    self._save(active, number, seen)

    def _delivered(
        self, active: Sequence[Member], bags: Sequence[int], number: int
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

    def _hand_out(self, active: list[Member], bag: int, learnt: BagBatch | None, shown: BagBatch | None) -> None:
        for member in list(active):
            if learnt is not None and member.wants(bag):
                member.learn(bag, learnt)
            if shown is not None and member.misses(bag):
                member.show(bag, shown)

    def _save(self, active: Sequence[Member], number: int, seen: int) -> None:
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
    def _failing(self, member: Member, active: list[Member]) -> Iterator[None]:
        """Where a member's training cannot go on, the others do."""
        try:
            yield
        except CfusionError as error:
            for stopped in self.failed(member, error):
                if stopped in active:
                    active.remove(stopped)
