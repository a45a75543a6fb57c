"""A factory whose model differs from the checkpoint's: its rotary embedding has another base frequency."""

import decoder


def build_model(config, parallel_context):
    model = decoder.build_model(config, parallel_context)
    model.model.rotary.inverse_frequencies.mul_(1.01)
    return model
