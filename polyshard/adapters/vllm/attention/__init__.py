"""Attention over vLLM's paged KV cache."""
