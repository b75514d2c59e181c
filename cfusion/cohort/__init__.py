"""Cohorts: patients, outcomes, slides, folds, and the audit of all of them."""
