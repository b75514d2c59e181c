"""CrossFusion, its variants and the baselines."""
