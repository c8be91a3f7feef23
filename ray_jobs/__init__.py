"""Entry points for `ray job submit -- python ray_jobs/<name>.py`."""
