"""JPEG-LM in JAX: a Llama-2 decoder that writes pictures by writing the bytes of their files."""
