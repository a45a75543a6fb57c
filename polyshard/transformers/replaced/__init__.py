"""Module surgery: trainable attention for models that were written without polyshard."""

from polyshard.transformers.replaced.surgery import Kept, Replacement, replace_with_trainable_attention

__all__ = ["Kept", "Replacement", "replace_with_trainable_attention"]
