"""Verify on one GPU what is written for CUDA: `make gpu-check` prepares it, docs/how-to/gpu.md explains it."""
