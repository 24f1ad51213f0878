"""What a training run is made of: its config, its data as features, its step, its directory."""
