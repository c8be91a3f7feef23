"""Training on a Ray cluster: Ray Data reads windows, Ray Train runs DeepSpeed's ranks, all results go to storage.

`launch` runs on the driver, `rank` on every training worker, `ingest` on Ray Data's workers, which read for the ranks.
"""
