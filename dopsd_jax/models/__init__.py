"""Flax linen networks: no IO, no training words."""
