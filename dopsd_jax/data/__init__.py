"""From image-text rows to the rows, captions and pixels of one step; no network, no JAX."""
