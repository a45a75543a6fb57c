"""Conversion of checkpoints between formats: detection, reading as logical tensors with Hugging Face names, writing."""

from polyshard.convert.convert import Conversion, convert
from polyshard.convert.formats import format_named, formats

__all__ = ["Conversion", "convert", "format_named", "formats"]
