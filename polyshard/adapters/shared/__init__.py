"""Code that several adapters share; it depends only on torch, and on no parallelism library."""
