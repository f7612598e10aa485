"""Models in the formats of others: folders of Hugging Face, read and written, and GGUF files."""
