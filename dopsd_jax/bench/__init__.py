"""Speed of the D-OPSD LoRA step beside a torch loop of the published trainer, on one device."""
