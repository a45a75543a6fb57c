"""A factory whose model is not the checkpoint's: its rotary embedding turns at another speed."""

import decoder


def build_model(config, parallel_context):
    model = decoder.build_model(config, parallel_context)
    model.model.rotary.inverse_frequencies.mul_(1.01)
    return model
