"""A factory for the model of decoder.py with one operator replaced."""

import decoder

CHANGED = 1  # the layer


def another_eps(config, context):
    model = decoder.build_model(config, context)
    model.model.layers[CHANGED].post_attention_layernorm.eps *= 2
    return model
