"""The one door to MLflow: what a run was, how it went, and the registered models."""

from cfusion.tracking.tracked_run import TrackedRun

__all__ = ["TrackedRun"]
