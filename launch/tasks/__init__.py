"""Work on other machines: SLURM job arrays and Ray tasks."""
