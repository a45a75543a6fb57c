"""Training steps over micro-batches, their data and monitoring, random number generators and dropout."""
