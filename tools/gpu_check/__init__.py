"""Verify on one GPU what polyshard has written for CUDA: `make gpu-check` prepares it, `docs/gpu.md` explains it."""
