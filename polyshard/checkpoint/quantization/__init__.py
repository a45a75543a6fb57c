"""Quantized checkpoints: detection and dequantization, region by region."""
