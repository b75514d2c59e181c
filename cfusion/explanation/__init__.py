"""Score how much each tile raises or lowers a slide's risk, and test whether the scores are faithful to the model."""

from cfusion.explanation.result import Explanation, TileScores
from cfusion.explanation.scoring import explain

__all__ = ["Explanation", "TileScores", "explain"]
