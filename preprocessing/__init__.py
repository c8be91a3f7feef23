"""Raw videos to the clip table. One step per module, each a pure function on columnar batches; `pipeline` joins them."""
