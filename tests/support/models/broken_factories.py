"""Factories that will not do."""

from torch import nn

import polyshard as ps


def raises(config, parallel_context):
    raise ZeroDivisionError("the user's bug")


def gives_none(config, parallel_context):
    pass


def gives_a_dict(config, parallel_context):
    return {}


class NoLogits(nn.Module):
    def forward(self, input_ids, positions):
        return input_ids


def lacks_compute_logits(config, parallel_context):
    return NoLogits()


class WrongForward(nn.Module):
    def forward(self, input_ids):
        return input_ids

    def compute_logits(self, hidden):
        return hidden


def wrong_forward(config, parallel_context):
    return WrongForward()


def three_heads(config, parallel_context):
    ps.qkv_parallel(64, 32, 3, 3, parallel_context)


not_callable = 3
