"""Rotary embedding with every scaling against transformers' own."""

import pytest
import torch
from support.rotary_scalings import SCALINGS
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import polyshard as ps
from polyshard.attention.rotary import apply_rotary, rotary_frequencies


@pytest.mark.parametrize("name", SCALINGS)
def test_queries_and_keys_turn_as_in_transformers(name):
    scaling = {**SCALINGS[name], "rope_theta": 50000.0}
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, max_position_embeddings=256, rope_parameters=scaling)
    positions = torch.arange(200).view(1, 200)
    q, k = torch.randn(1, 200, 4, 32), torch.randn(1, 200, 2, 32)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    want = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotary = ps.RotaryEmbedding(32, theta=50000.0, scaling=scaling, max_position=256)
    got = [apply_rotary(x, *rotary(positions, x.dtype)) for x in (q, k)]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_a_part_of_the_head_can_be_rotated():
    rotary = ps.RotaryEmbedding(32, rotary_dim=8)
    x = torch.randn(5, 2, 32)
    turned = apply_rotary(x, *rotary(torch.arange(5), x.dtype))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert not torch.equal(turned[1:, :, :8], x[1:, :, :8])


def test_unknown_and_incomplete_scalings_are_refused():
    with pytest.raises(
        ps.ConfigurationError, match="rotary scaling is unknown: got 'spiral', expected one of default, linear"
    ):
        rotary_frequencies(32, 1e4, {"rope_type": "spiral"}, 64)
    with pytest.raises(ps.ConfigurationError, match="rotary scaling 'linear' is missing: got .*, expected 'factor'"):
        rotary_frequencies(32, 1e4, {"type": "linear"}, 64)
    with pytest.raises(ps.ConfigurationError, match="rotary dimension is invalid: got 7, expected an even number"):
        rotary_frequencies(7, 1e4, None, 64)


def test_a_compiled_graph_computes_cosines_once():
    """And not for every layer again, which took as long as the rotation."""
    from torch._inductor.utils import run_and_get_code

    rotary, weight = ps.RotaryEmbedding(32), torch.randn(32, 32)

    def layers(x, positions):
        cos, sin = rotary(positions, x.dtype)
        for _ in range(3):
            x = apply_rotary(x @ weight, cos, sin)
        return x

    x, positions = torch.randn(9, 2, 32), torch.arange(9)
    found, (code,) = run_and_get_code(torch.compile(layers, fullgraph=True), x, positions)
    torch.testing.assert_close(found, layers(x, positions), atol=1e-4, rtol=1e-3)
    assert code.count(".cos()") == code.count(".sin()") == 1
