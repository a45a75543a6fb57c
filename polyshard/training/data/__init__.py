"""Training data: documents packed into rows of a fixed length, and a loader that resumes at any data-parallel size."""

from polyshard.training.data.loader import StepLoader
from polyshard.training.data.packing import PackedDocuments, packed_batch

__all__ = ["PackedDocuments", "StepLoader", "packed_batch"]
