"""Checkpoints of other programs: detected, read into Hugging Face names and logical tensors, and written again."""

from polyshard.convert.convert import Conversion, convert
from polyshard.convert.formats import format_named, formats

__all__ = ["Conversion", "convert", "format_named", "formats"]
