"""vLLM's own reload of weights has traps that fail without a word. Each has a test: on registered models it is right.

What vLLM does is in model_executor/model_loader/reload/layerwise.py: parameters become meta tensors that only their
`weight_loader` fills, and packed copies follow only from a layer's `quant_method`.
"""

import decoder
import pytest
import support.vllm_required  # noqa: F401
import torch
from support.engines import engine, greedy
from support.models.tiny import save_tiny, tiny_config, tiny_model
from torch import nn

import polyshard as ps
from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.transfer.receiver import receiver_for

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2, 3, 4, 5], list(range(30))]
TOKENS = 8


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def directories(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reload")
    changes = {"head_dim": 32, "tie_word_embeddings": request.param}
    old = save_tiny(folder / "old", "qwen3", **changes)
    tiny_model(tiny_config("qwen3", **changes), seed=5).save_pretrained(folder / "new")
    return request.param, old, folder / "new"


def reload(llm, directory):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
    llm.reset_prefix_cache()


def distance(first, second):
    return max(abs(a - b) for (_, x), (_, y) in zip(first, second) for a, b in zip(x, y))


@pytest.mark.parametrize("adapter", ["vllm", "torch"])
def test_meta_tensors_and_packed_copies_after_vllms_reload(directories, adapter):
    """New weights are in effect, also in the packed copies and in a tied head."""
    _, old, new = directories
    name = f"Reload{adapter}"
    ps.register_model(name, decoder.build_model, adapter=adapter)
    with engine(new, name) as llm:
        want = greedy(llm, PROMPTS, TOKENS)
    with engine(old, name) as llm:
        before = greedy(llm, PROMPTS, TOKENS)
        reload(llm, new)
        after = greedy(llm, PROMPTS, TOKENS)
        reload(llm, new)
        assert greedy(llm, PROMPTS, TOKENS) == after == want != before


def test_what_vllm_does_to_its_own_tied_head(directories):
    """On CPU its packed head stays the old one. When this fails, vLLM has mended it, and compat.end_reload may go."""
    tied, old, new = directories
    with engine(new) as llm:
        want = greedy(llm, PROMPTS, TOKENS)
    with engine(old) as llm:
        reload(llm, new)
        wrong = distance(greedy(llm, PROMPTS, TOKENS), want)
        assert (wrong > 1e-2) == tied
        # The same through polyshard is right.
        context = ps.initialize("torch")
        model = decoder.build_model(ps.read_config(new), context)
        ps.load_checkpoint(model, new, context)
        ps.WeightSync(model, context, llm)()
        assert greedy(llm, PROMPTS, TOKENS) == want


class Offset(nn.Module):
    """A user's layer with a persistent buffer and a parameter."""

    def __init__(self, size, value):
        super().__init__()
        self.register_buffer("constant", torch.full((size,), value))
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.scale + self.constant


def build_with_buffer(config, parallel_context):
    model = decoder.build_model(config, parallel_context)
    norm, model.offset = model.model.norm, Offset(config.hidden_size, 0.25)
    forward = norm.forward
    norm.forward = lambda x: model.offset(forward(x))
    return model


def test_a_persistent_buffer_survives_vllms_reload(directories, tmp_path):
    """vLLM leaves it uninitialised, without a word."""
    _, old, new = directories
    context = ps.initialize("torch")
    for source in (old, new):
        model = build_with_buffer(ps.read_config(source), context)
        ps.load_checkpoint(decoder.build_model(ps.read_config(source), context), source, context)
        ps.initialize_weights(model, context, seed=1 if source is old else 2)
        ps.save_checkpoint(model, tmp_path / source.name, context, config=ps.read_config(source))
    ps.register_model("Buffered", build_with_buffer)
    with engine(tmp_path / "new", "Buffered") as llm:
        want = greedy(llm, PROMPTS, TOKENS)
    with engine(tmp_path / "old", "Buffered") as llm:
        reload(llm, tmp_path / "new")
        constant = compat.local_worker(llm).model.model.offset.constant
        assert bool((constant == 0.25).all())
        assert greedy(llm, PROMPTS, TOKENS) == want


def test_loading_into_a_running_model_is_refused(directories):
    """Outside of an update, packed copies would go on with the old weights."""
    _, old, _ = directories
    ps.register_model("Running", decoder.build_model)
    with engine(old, "Running") as llm:
        before = greedy(llm, PROMPTS, TOKENS)
        with pytest.raises(ps.CheckpointError, match="load_weights alone would leave packed copies of the old weights"):
            compat.local_worker(llm).model.load_weights(iter([("model.norm.weight", torch.zeros(48))]))
        assert greedy(llm, PROMPTS, TOKENS) == before


def test_a_reload_that_does_not_fit_is_an_error(directories, tmp_path):
    _, old, _ = directories
    ps.register_model("Fitting", decoder.build_model)
    other = save_tiny(tmp_path / "other", "qwen3", head_dim=32, num_hidden_layers=1)
    with engine(old, "Fitting") as llm:
        want = greedy(llm, PROMPTS, TOKENS)
        with pytest.raises(Exception, match=r"does not fit model 'Fitting'.*missing"):
            reload(llm, other)
        worker = compat.local_worker(llm)
        with pytest.raises(ps.WeightSyncError, match="a reload of its weights has begun and is not finished"):
            worker.model(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        with pytest.raises(ps.WeightSyncError, match="parameters without memory after a failed reload"):
            receiver_for(worker.model, worker.vllm_config).begin("v1")
        reload(llm, old)
        assert greedy(llm, PROMPTS, TOKENS) == want
