"""Phantom cohorts: drawn slides with a known risk."""
