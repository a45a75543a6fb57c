"""vLLM's parallel layers, with polyshard's CPU kernels where they are faster."""
