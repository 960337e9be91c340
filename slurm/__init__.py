"""From cells to jobs, and from jobs to SLURM or this machine."""
