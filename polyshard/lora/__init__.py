"""LoRA: training of low-rank matrices beside frozen weights on every library's layers, in PEFT's file format."""

from polyshard.lora.add import add_lora, lora_disabled
from polyshard.lora.files import load_lora, save_lora
from polyshard.lora.merge import save_merged_lora

__all__ = ["add_lora", "load_lora", "lora_disabled", "save_lora", "save_merged_lora"]
