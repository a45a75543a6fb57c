"""Model weights on disk: a plain Hugging Face directory, whatever library and sizes wrote it."""

from polyshard.checkpoint.config import ModelConfig, read_config
from polyshard.checkpoint.load import load_checkpoint
from polyshard.checkpoint.save import save_checkpoint

__all__ = ["ModelConfig", "load_checkpoint", "read_config", "save_checkpoint"]
