"""CrossFusion at cluster scale: survival from whole-slide images, with numbers a reviewer can trust.

The names below are the public API; each is imported when it is first used, so that `import cfusion` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_API = {
    "load_config": "cfusion.config",
    "read_cohort": "cfusion.cohort.read",
    "read_cohorts": "cfusion.cohort.joint",
    "make_splits": "cfusion.cohort.splits",
    "fit": "cfusion.training.folds",
    "cross_validate": "cfusion.runs.crossval",
    "predict": "cfusion.apply.ensemble",
    "FoldEnsemble": "cfusion.apply.ensemble",
    "FeatureStore": "cfusion.data.store",
    "explain": "cfusion.explanation",
    "score": "cfusion.survival.score",
    "write_report": "cfusion.report",
    "Config": "cfusion.config",
    "Cohort": "cfusion.types",
    "Split": "cfusion.types",
    "FoldRun": "cfusion.training.folds",
    "FittedModel": "cfusion.training.fitted",
    "ModelCard": "cfusion.training.fitted",
    "StratumCard": "cfusion.training.fitted",
    "Seen": "cfusion.training.seen",
    "EmbeddingRegion": "cfusion.training.seen",
    "SlideFeatures": "cfusion.types",
    "Explanation": "cfusion.explanation",
    "TileScores": "cfusion.explanation",
    "Scores": "cfusion.survival.score",
    "AddedValue": "cfusion.survival.added",
    "Estimate": "cfusion.survival.added",
    "AdjustedRatio": "cfusion.survival.regression",
    "DecisionCurve": "cfusion.survival.decision",
    "PatientScores": "cfusion.survival.patients",
    "Calibration": "cfusion.survival.patients",
    "CalibrationPoint": "cfusion.survival.calibration",
    "Curve": "cfusion.survival.groups",
    "HazardRatio": "cfusion.survival.groups",
}

__all__ = ["__version__", *_API]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'cfusion' has no attribute {name!r}")
    return getattr(importlib.import_module(_API[name]), name)
