"""The exported folder: weights as safetensors, config, tokenizer, model card (docs/export.md)."""
