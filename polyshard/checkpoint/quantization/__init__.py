"""Quantized files: detected, dequantized region by region, or refused."""
