"""Other people's files: names and shapes of the Hugging Face, timm and original layouts."""
