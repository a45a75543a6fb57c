"""What functions of a layer's output leave to the layer's engine, and what they do themselves."""

import dataclasses

import pytest
import torch

import polyshard as ps
from polyshard.layers.fused import FusedProducts

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
RESIDUAL = torch.ones(3, 8)
CALLS = {
    "swiglu": (lambda layer: ps.swiglu(X, layer), lambda layer: ps.swiglu(layer(X)), X),
    "add_residual": (
        lambda layer: ps.add_residual(RESIDUAL, X, layer),
        lambda layer: RESIDUAL + layer(X),
        RESIDUAL,
    ),
}


@pytest.fixture(params=CALLS)
def call(request):
    """Of a layer; what it is in torch's operations; what `packed` gives for it."""
    return CALLS[request.param]


@pytest.fixture
def packed():
    """A layer as an engine leaves it; its products give back what they are given."""
    layer = torch.nn.Linear(6, 8)
    layer.fused_products = FusedProducts(out_features=8, added_to=lambda residual, x: residual, swiglu=lambda x: x)
    return layer


def test_a_layer_that_no_engine_packed(call):
    of, plain, _ = call
    layer = torch.nn.Linear(6, 8)
    assert torch.equal(of(layer), plain(layer))


def test_hooks_see_the_output(call, packed):
    of, plain, given = call
    assert of(packed) is given
    seen = []
    handle = packed.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(of(packed), plain(packed))
    assert len(seen) == 2
    handle.remove()
    assert of(packed) is given


def test_a_wrapper_that_hands_on_what_a_layer_has_is_called_itself(call, packed):
    class Wrapper(torch.nn.Module):
        """As vLLM's around a layer with LoRA adapters."""

        def __init__(self, layer):
            super().__init__()
            self.inner = layer

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, x):
            return 2 * self.inner(x)

    of, plain, _ = call
    wrapper = Wrapper(packed)
    assert wrapper.fused_products is packed.fused_products
    assert torch.equal(of(wrapper), plain(wrapper))


def test_outputs_that_are_no_gates(packed):
    packed.fused_products = dataclasses.replace(packed.fused_products, swiglu=None)
    assert torch.equal(ps.swiglu(X, packed), ps.swiglu(packed(X)))


@pytest.mark.parametrize(
    "residual",
    [torch.ones(3, 8, dtype=torch.float64), torch.ones(8), torch.ones(3, 1)],
    ids=["dtype", "one-row", "one-column"],
)
def test_a_residual_unlike_the_output_is_added_by_torch(packed, residual):
    assert torch.equal(ps.add_residual(residual, X, packed), residual + packed(X))


def test_without_a_residual_it_is_the_layer(packed):
    assert torch.equal(ps.add_residual(None, X, packed), packed(X))


def test_gradients_of_a_sum():
    layer, residual = torch.nn.Linear(6, 8), RESIDUAL.clone().requires_grad_()
    ps.add_residual(residual, X, layer).sum().backward()
    assert torch.equal(residual.grad, torch.ones(3, 8))
    assert torch.equal(layer.bias.grad, torch.full((8,), 3.0))


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vllms_operator_is_the_activation_of_an_engine_on_a_gpu(dtype):
    """The operator is there on CPU too; oracle: float64."""
    from polyshard.adapters.vllm.layers.activation import use_swiglu_operator

    layer = torch.nn.Linear(6, 32, dtype=dtype)
    x = X.to(dtype)
    with torch.no_grad():
        gate, up = layer(x).double().chunk(2, dim=-1)
        want = torch.nn.functional.silu(gate) * up
        use_swiglu_operator(layer)
        torch.testing.assert_close(ps.swiglu(x, layer).double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(ps.add_residual(torch.ones(3, 32, dtype=dtype), x, layer), 1 + layer(x))


@pytest.mark.vllm
@pytest.mark.usefixtures("compiles")
def test_what_is_compiled_fuses_the_activation_itself():
    from polyshard.adapters.vllm.layers.activation import use_swiglu_operator

    layer = torch.nn.Linear(6, 32)
    use_swiglu_operator(layer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    with torch.no_grad():
        got = torch.compile(lambda x: ps.swiglu(x, layer), fullgraph=True, backend=backend)(X)
        torch.testing.assert_close(got, ps.swiglu(layer(X)), rtol=1e-6, atol=1e-6)
    assert "silu" in graphs[0]
    assert "silu_and_mul" not in graphs[0]
