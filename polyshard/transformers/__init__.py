"""transformers' causal language models as they are: their layers exchanged for parallel ones, their code unchanged."""

from polyshard.transformers.model import TransformersModel, transformers_model

__all__ = ["TransformersModel", "transformers_model"]
