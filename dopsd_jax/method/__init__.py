"""D-OPSD itself: rollout, contexts, objectives and the update, as pure functions."""
