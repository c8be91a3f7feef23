"""Entry points for `ray job submit -- python ray_jobs/<name>.py`: the commands, on the cluster that runs them."""
