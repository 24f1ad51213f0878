"""What knows JAX but not diffusion: trees, checks, sharding, checkpoints, metrics."""
