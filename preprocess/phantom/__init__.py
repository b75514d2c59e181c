"""Phantom cohorts: synthetic slides with a known risk."""
