"""Checkpoints on object stores and other remote file systems, by fsspec URL."""
