from unittest.mock import create_autospec

from cfusion.data.bags import BagEntry
from cfusion.data.loader import BagLoader, BagSet
from cfusion.data.partition import distribute


def test_a_token_budget_counts_the_tiles_that_training_draws():
    bags = tuple(BagEntry(f"c{i}", f"c{i}", (f"s{i}",), {"x20": 4000, "x10": 1000, "x5": 250}) for i in range(4))
    for most, length, passes in ((None, 5250, 4), (400, 1050, 1)):
        chosen = BagSet(bags, create_autospec(BagLoader, instance=True), most)
        assert chosen.lengths.tolist() == [length] * 4
        assert len(distribute(chosen.costs, 1, lengths=chosen.lengths, token_budget=4200)[0]) == passes
