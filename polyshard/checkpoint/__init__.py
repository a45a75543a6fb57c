"""Checkpoints and training states as safetensors and JSON, independent of the library and sizes that wrote them."""

from polyshard.checkpoint.config import ModelConfig, read_config
from polyshard.checkpoint.directory import latest_checkpoint
from polyshard.checkpoint.load import load_checkpoint
from polyshard.checkpoint.pending import PendingSave
from polyshard.checkpoint.remote.transfer import download_checkpoint, upload_checkpoint
from polyshard.checkpoint.save import save_checkpoint, save_config
from polyshard.checkpoint.training_state import TrainingState, load_training_state, save_training_state

__all__ = [
    "ModelConfig",
    "PendingSave",
    "TrainingState",
    "download_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_training_state",
    "read_config",
    "save_checkpoint",
    "save_config",
    "save_training_state",
    "upload_checkpoint",
]
