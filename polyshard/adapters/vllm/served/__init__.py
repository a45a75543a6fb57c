"""The model class that vLLM builds: the user's factory between vLLM's loader, forward and pipeline."""
