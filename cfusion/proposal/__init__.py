"""The configuration that `cfusion init` proposes for a cohort, from its table and its features."""
