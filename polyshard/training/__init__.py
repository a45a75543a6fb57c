"""Training steps over micro-batches, random number generators and dropout."""
