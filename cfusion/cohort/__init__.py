"""Read cohorts (patients, outcomes, slides), draw or read their folds, and audit both."""
