"""transformers' causal language models with parallel layers in place of their own; the models' code runs unchanged."""

from polyshard.transformers.model import TransformersModel, transformers_model

__all__ = ["TransformersModel", "transformers_model"]
