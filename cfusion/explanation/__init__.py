"""What raises and lowers a slide's risk, tile by tile, and whether the scores can be believed."""

from cfusion.explanation.explain import explain
from cfusion.explanation.result import Explanation, TileScores

__all__ = ["Explanation", "TileScores", "explain"]
