"""Raw videos to the clip table. Each step is a pure function on columnar batches; `pipeline` joins them."""
