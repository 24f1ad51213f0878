"""Names and files: safetensors in and out, name tables, LoRA formats."""
