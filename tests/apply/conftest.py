"""Fixtures of the tests that predict with untrained fold models."""

from untrained_models import cfusion, files  # noqa: F401 - fixtures
