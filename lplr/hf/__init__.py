"""The only door to transformers and huggingface_hub."""
