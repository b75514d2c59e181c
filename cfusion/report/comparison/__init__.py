"""The report of a sweep: methods compared over cohorts."""
