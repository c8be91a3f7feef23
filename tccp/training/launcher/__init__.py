"""Training on a Ray cluster: Ray Data reads windows, Ray Train runs DeepSpeed's ranks, all that is kept is in storage.

`launch` runs on the driver; `rank` on every training worker; `ingest` is what Ray Data's workers do for them; `cluster`
asks what there is.
"""
