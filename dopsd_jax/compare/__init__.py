"""Runs compared: what they draw, measured on the same noise, with intervals."""
