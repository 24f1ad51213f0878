"""The mini model: its world of pictures, its training stages' data, and its judge."""
