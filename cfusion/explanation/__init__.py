"""What raises and lowers a slide's risk, tile by tile, and whether the scores can be believed."""

from cfusion.explanation.result import Explanation, TileScores
from cfusion.explanation.scoring import explain

__all__ = ["Explanation", "TileScores", "explain"]
