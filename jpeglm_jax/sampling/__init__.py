"""Sampling: rules from logits to a token, the loop on the device, pictures and sheets of them."""
