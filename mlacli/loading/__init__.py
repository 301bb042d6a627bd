"""GGUF files: header, weights by byte range, tokenizer."""
