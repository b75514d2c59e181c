"""Track runs with MLflow and register models; no other package uses MLflow for tracking."""

from cfusion.tracking.tracked_run import TrackedRun

__all__ = ["TrackedRun"]
