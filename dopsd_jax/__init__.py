"""D-OPSD in JAX: tune step-distilled text-to-image transformers without losing few-step quality."""
