"""A module that exists in this process, served as it is: an engine over the trainer's own memory."""

import decoder
import pytest
import support.vllm_required  # noqa: F401
import torch
from support.engines import engine, greedy
from support.models.tiny import save_tiny
from support.scripts import on_engine_ranks
from support.workers.colocated_live_module import serve_own

import polyshard as ps
from polyshard.adapters.vllm.compat import local_worker

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40)), list(range(40))]
TOKENS = 8
LIBRARIES = ("torch", "megatron", "deepspeed", "fairscale")


class Trained:
    """A model as a training loop holds it, and a folder that holds its config.json and nothing else."""

    def __init__(self, folder, adapter="torch", **initialize):
        checkpoint = save_tiny(folder / "checkpoint", "qwen3", head_dim=32, tie_word_embeddings=True)
        self.config = ps.read_config(checkpoint)
        self.context = ps.initialize(adapter, **initialize)
        self.model = decoder.build_model(self.config, self.context)
        ps.load_checkpoint(self.model, checkpoint, self.context)
        self.config_alone = ps.save_config(folder / "config", self.config, architecture="Existing")

    def step(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))

    def saved(self, folder):
        """What an engine generates that loads these weights from disk into vLLM's layers."""
        ps.save_checkpoint(self.model, folder, self.context, config=self.config)
        ps.register_model("Loaded", decoder.build_model)
        with engine(folder, "Loaded") as llm:
            return greedy(llm, PROMPTS, TOKENS)


def tokens(answers):
    return [answer[0] for answer in answers]


@pytest.mark.parametrize("adapter", LIBRARIES)
def test_an_engine_shares_its_memory_and_follows_its_steps(tmp_path, adapter):
    trained = Trained(tmp_path, adapter)
    torch.manual_seed(3)
    before = trained.saved(tmp_path / "before")
    hooks = [len(module._forward_hooks) for module in trained.model.modules()]
    ps.register_model("Existing", trained.model)
    with engine(trained.config_alone, load_format="polyshard", enable_prefix_caching=True) as llm:
        served = dict(local_worker(llm).model.model.named_parameters())
        for name, parameter in trained.model.named_parameters():
            assert served[name].data_ptr() == parameter.data_ptr(), name
            assert parameter.requires_grad
            assert not served[name].requires_grad
        assert tokens(greedy(llm, PROMPTS, TOKENS)) == tokens(before)
        trained.step()
        with pytest.raises(ps.WeightSyncError, match="changed its weights since the engine was started"):
            greedy(llm, PROMPTS, TOKENS)
        with ps.WeightSync(trained.model, trained.context, llm) as sync:
            report = sync("after a step")
            assert report.shared_bytes == report.nbytes, "everything is shared"
            after = greedy(llm, PROMPTS, TOKENS)
            trained.step()
            with pytest.raises(ps.WeightSyncError, match="changed its weights since the last sync"):
                greedy(llm, PROMPTS, TOKENS)
            sync()
            last = greedy(llm, PROMPTS, TOKENS)
        ids = torch.arange(24)
        trained.model.compute_logits(trained.model(ids, ids)).sum().backward()  # it trains on as before
        assert all(parameter.grad is not None for parameter in trained.model.parameters())
    assert tokens(after) != tokens(before)
    assert tokens(last) == tokens(trained.saved(tmp_path / "last"))
    assert [len(module._forward_hooks) for module in trained.model.modules()] == hooks


@pytest.mark.parametrize("adapter", ["megatron"])
def test_two_ranks_serve_the_shards_that_they_hold(tmp_path, adapter):
    """vLLM's external launcher: trainer ranks are engine ranks."""
    checkpoint = save_tiny(tmp_path / "checkpoint", "qwen3", head_dim=32, tie_word_embeddings=True)
    first, second = on_engine_ranks(serve_own, 2, checkpoint, tmp_path, adapter)
    assert first == second
    assert first["shared"] == first["held"] > 0
    assert "changed its weights since the engine was started" in first["refused"]
    ps.register_model("Loaded", decoder.build_model)
    for folder, which in ((checkpoint, "before"), (tmp_path / "trained", "after")):
        with engine(folder, "Loaded") as llm:
            assert tokens(first[which]) == [list(answer) for answer in tokens(greedy(llm, PROMPTS, TOKENS))]
    assert tokens(first["before"]) != tokens(first["after"])


def test_in_exact_mode_it_has_the_trainers_bits(tmp_path):
    trained = Trained(tmp_path, exact=True)
    ps.register_model("Existing", trained.model, exact=True)
    with engine(trained.config_alone, load_format="polyshard") as llm:
        answers = greedy(llm, PROMPTS[2:3], TOKENS)
    whole = torch.tensor(PROMPTS[2] + answers[0][0])
    with torch.no_grad():
        logits = trained.model.compute_logits(trained.model(whole[:-1], torch.arange(len(whole) - 1)))
    mine = logits.float().log_softmax(-1)[len(PROMPTS[2]) - 1 :]
    assert [float(row[token]) for row, token in zip(mine, answers[0][0])] == answers[0][1]


def test_a_model_of_transformers_as_it_is(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, head_dim=32
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    ids = torch.tensor([PROMPTS[2]])
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)[0, 40:]
    ps.replace_with_trainable_attention(theirs)

    class Served(torch.nn.Module):
        """What vLLM asks for, around what transformers has."""

        def __init__(self):
            super().__init__()
            self.theirs = theirs

        def forward(self, input_ids, positions):
            return self.theirs.model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state

        def compute_logits(self, hidden):
            return self.theirs.lm_head(hidden)

    ps.register_model("Existing", Served(), inputs="batched")
    folder = ps.save_config(tmp_path, config, architecture="Existing")
    with engine(folder, load_format="polyshard") as llm:
        assert greedy(llm, PROMPTS[2:3], TOKENS)[0][0] == want.tolist()


class Refused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(96, 64)

    def forward(self, input_ids, positions):
        return self.embed(input_ids)

    def compute_logits(self, hidden):
        return hidden @ self.embed.weight.T


def compiled(trained):
    trained.model.model.layers[0].forward = torch.compile(trained.model.model.layers[0].forward)


def hooked(trained):
    trained.model.model.layers[1].register_forward_hook(lambda *_: None)


def halved(trained):
    trained.model.to(torch.bfloat16)


def without_attention(trained):
    trained.model = Refused()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (compiled, r"model\.layers\.0 has a replaced forward \(compiled or wrapped\): register its factory"),
        (hooked, r"model\.layers\.1 has forward hooks"),
        (halved, r"has the wrong dtype: got bfloat16, expected float32. Start the engine with dtype='bfloat16'"),
        (without_attention, r"Refused has no attention that an engine can serve"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_shared_is_refused_by_name(tmp_path, change, reason):
    trained = Trained(tmp_path)
    change(trained)
    ps.register_model("Existing", trained.model)
    with pytest.raises(ps.RegistrationError, match=reason), engine(trained.config_alone, load_format="polyshard"):
        pass


def test_nothing_writes_over_the_trainers_weights(tmp_path):
    trained = Trained(tmp_path)
    ps.register_model("Existing", trained.model)
    ps.register_model("Loaded", decoder.build_model)
    for options, name, reason in (
        ({"load_format": "dummy"}, "Existing", "load_format='dummy' would overwrite its weights"),
        ({"load_format": "polyshard"}, "Loaded", "load_format='polyshard' is only for a module of this process"),
    ):
        with pytest.raises(ps.RegistrationError, match=reason), engine(trained.config_alone, name, **options):
            pass
    with pytest.raises(ps.RegistrationError, match="remove adapter='torch'"):
        ps.register_model("Existing", trained.model, adapter="torch")


def test_layers_that_would_keep_no_cache_in_an_engine_are_named():
    import transformers

    from polyshard.registry.live_module import served_copy

    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    lfm2 = transformers.Lfm2Config(**sizes, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    words = {
        "Lfm2ShortConv .model.layers.0.conv., which carries state": lfm2,
        "model.layers.0.self_attn .CohereAttention. is unsupported attention": transformers.CohereConfig(
            **sizes, num_hidden_layers=2
        ),
    }
    context = ps.initialize()
    for expected, config in words.items():
        with pytest.raises(ps.RegistrationError, match=expected):
            served_copy(ps.transformers_model(config, context), context)
