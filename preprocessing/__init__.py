"""Raw videos to the clip table: steps on columnar batches, which `preprocessing.graph` connects."""
