from __future__ import annotations

from cfusion.data.bags import BagEntry
from cfusion.data.partition import deal
from cfusion.training.inference import BagSet


def test_a_token_budget_counts_the_tiles_that_training_draws():
    bags = tuple(BagEntry(f"c{i}", f"c{i}", (f"s{i}",), {"x20": 4000, "x10": 1000, "x5": 250}) for i in range(4))
    for most, length, passes in ((None, 5250, 4), (400, 1050, 1)):
        chosen = BagSet(bags, None, most)
        assert chosen.lengths.tolist() == [length] * 4
        assert len(deal(chosen.costs, 1, lengths=chosen.lengths, token_budget=4200)[0]) == passes
