"""Weights over the network: generation after a sync is that of a fresh engine, and who fails is named by every rank."""

import contextlib
import socket
import time

import decoder
import pytest
import support.vllm_required  # noqa: F401
import torch
from support.engines import engine, greedy
from support.models.tiny import save_tiny

import polyshard as ps
from polyshard.adapters.vllm.engines import pool
from polyshard.adapters.vllm.transfer import network_receiver
from polyshard.launch.ranks import run_ranks

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40)), list(range(40))]  # the last meets the prefix cache
TOKENS = 8
NETWORK = {"weight_transfer_config": {"backend": "polyshard"}, "enable_prefix_caching": True}


class Trained:
    """A checkpoint to start engines from, and a trainer whose weights have moved on."""

    def __init__(self, folder):
        self.old = save_tiny(folder / "old", "qwen3", head_dim=32, tie_word_embeddings=True)
        self.context = ps.initialize("torch")
        self.model = decoder.build_model(ps.read_config(self.old), self.context)
        ps.load_checkpoint(self.model, self.old, self.context)
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.new = ps.save_checkpoint(self.model, folder / "new", self.context, config=ps.read_config(self.old))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("network"))


@pytest.fixture(autouse=True)
def registered():
    ps.register_model("Far", decoder.build_model)


@pytest.mark.parametrize("served", ["Far", None], ids=["a registered model", "vLLM's own model"])
def test_after_a_sync_an_engine_generates_as_a_fresh_one(trained, served):
    """Decoded tokens and their log-probabilities, and not only fingerprints."""
    with engine(trained.new, served) as llm:
        want = greedy(llm, PROMPTS, TOKENS)
    with engine(trained.old, served, **NETWORK) as llm:
        old = greedy(llm, PROMPTS, TOKENS)
        client = ps.LlmClient(llm, "near")
        with ps.WeightSync(trained.model, trained.context, client, bucket_bytes=10_000, timeout=30) as sync:
            for version in ("one", "two"):
                report = sync(version)
                assert greedy(llm, PROMPTS, TOKENS) == want
                assert report.version == llm.llm_engine.get_weight_version() == version
            assert report.nbytes == 4 * sum(parameter.numel() for parameter in trained.model.parameters())
    assert old != want


def test_engines_join_and_leave_and_a_damaged_tensor_is_named(trained, monkeypatch, caplog):
    with (
        engine(trained.old, "Far", **NETWORK) as first,
        engine(trained.old, "Far", **NETWORK, dtype="bfloat16") as second,
    ):
        sync = ps.WeightSync(trained.model, trained.context, ps.LlmClient(first, "first"), timeout=30)
        sync("1")
        with pytest.raises(ps.ConfigurationError, match="two engines have the same name: 'first'"):
            sync.join(ps.LlmClient(second, "first"))
        sync.join(ps.LlmClient(first, "twin"))
        with pytest.raises(ps.ConfigurationError, match="first and twin are one engine. Pass it once"):
            sync("2")
        sync.leave("twin")
        sync.join(ps.LlmClient(second, "second"))
        sync("2")
        assert [llm.llm_engine.get_weight_version() for llm in (first, second)] == ["2", "2"]

        victim, read_back = "model.layers.1.self_attn.k_proj.weight", network_receiver.NetworkReceiver._read_back

        def damaging(self, part, target):
            if self._needs[part.need].name == victim and target.dtype == torch.bfloat16:
                target.mul_(1.5)
            return read_back(self, part, target)

        with monkeypatch.context() as patched:
            patched.setattr(network_receiver.NetworkReceiver, "_read_back", damaging)
            message = rf"second: .*worker 0: '{victim}' arrived damaged in worker 0: sent \w+, found \w+"
            with pytest.raises(ps.WeightSyncError, match=message) as caught:
                sync("3")
        assert caught.value.engines == ("second",)
        assert first.llm_engine.get_weight_version() == "3", "the other engine has the new weights"
        with pytest.raises(ps.WeightSyncError, match="refuses to generate.*its last weight update failed"):
            greedy(second, PROMPTS[:1], TOKENS)
        sync("4")
        assert len(greedy(second, PROMPTS[:1], TOKENS)) == 1, "the next sync connects again, and repairs it"
        sync.leave("second")
        sync("5")
        assert [llm.llm_engine.get_weight_version() for llm in (first, second)] == ["5", "4"]
        with pytest.raises(ps.ConfigurationError, match="there is no engine 'second': expected one of first"):
            sync.leave("second")
        sync.close()

        # Behind a RolloutEngine, the second engine fails each sync.
        monkeypatch.setattr(pool, "_PATIENCE", 0)
        monkeypatch.setattr(pool, "_LEAST", 1.0)
        clients = [ps.LlmClient(first, "first"), ps.LlmClient(second, "second")]
        attempts = []

        def damaging_and_counting(self, part, target):
            attempts.append(target.dtype)
            return damaging(self, part, target)

        with ps.RolloutEngine(None, None, trained.model, trained.context, engines=clients, sync_timeout=30) as rollouts:
            with monkeypatch.context() as patched:
                patched.setattr(network_receiver.NetworkReceiver, "_read_back", damaging_and_counting)
                rollouts.sync("6")
                assert "the engine second gets no weights until it can be reached again" in caplog.text
                time.sleep(1.1)
                rollouts.sync("7")
                assert "the engine second has failed each sync, and gets no weights until it leaves" in caplog.text
                assert f"'{victim}' arrived damaged in worker 0" in caplog.text
                assert torch.bfloat16 in attempts
                attempts.clear()
                rollouts.sync("8")
                assert set(attempts) == {torch.float32}, "it is not tried again"
                ((answer,),) = rollouts.generate(PROMPTS[:1], max_tokens=2)
                assert answer.versions == ("8", "8")
            rollouts.leave("second")
            rollouts.join(clients[1])
            rollouts.sync("9")
            assert [llm.llm_engine.get_weight_version() for llm in (first, second)] == ["9", "9"]
            rollouts.leave("first")
            with monkeypatch.context() as patched:
                patched.setattr(network_receiver.NetworkReceiver, "_read_back", damaging)
                with pytest.raises(ps.WeightSyncError, match="second: .*arrived damaged") as caught:
                    rollouts.sync("10")
            assert caught.value.engines == ("second",)


def test_another_model_is_refused_before_anything_is_sent(trained, tmp_path):
    other = save_tiny(tmp_path / "other", "qwen3", head_dim=32, intermediate_size=96)
    with engine(other, "Far", **NETWORK) as llm:
        before = greedy(llm, PROMPTS[:1], TOKENS)
        sync = ps.WeightSync(trained.model, trained.context, ps.LlmClient(llm), timeout=30)
        with pytest.raises(ps.WeightSyncError, match=r"has the wrong shape for the engine: got \[80, 48\], expected"):
            sync()
        config = {**ps.read_config(other).to_dict(), "rms_norm_eps": 1e-3}
        model = decoder.build_model(ps.ModelConfig(**config), trained.context)
        sync = ps.WeightSync(model, trained.context, ps.LlmClient(llm, "far"), timeout=30)
        with pytest.raises(ps.WeightSyncError, match=r"far: The models compute differently .* eps of the layer of"):
            sync()
        assert greedy(llm, PROMPTS[:1], TOKENS) == before, "it goes on with its own weights"


def sync_with(urls, directory):
    """On each rank: the error of a sync with servers that do not answer, and its time."""
    import decoder

    context = ps.initialize("torch", timeout=10)
    model = decoder.build_model(ps.read_config(directory), context)
    sync = ps.WeightSync(model, context, [ps.HttpClient(url, timeout=60) for url in urls], timeout=4)
    started = time.monotonic()
    try:
        sync()
    except ps.WeightSyncError as error:
        return str(error), error.engines, time.monotonic() - started
    return None


def test_every_rank_names_the_servers_that_cannot_be_reached(trained):
    """A port where nobody listens, and a server that takes a connection and is frozen."""
    with contextlib.closing(socket.socket()) as closed, contextlib.closing(socket.create_server(("", 0))) as frozen:
        closed.bind(("127.0.0.1", 0))  # keeps the port, and does not listen
        urls = [f"http://127.0.0.1:{place.getsockname()[1]}" for place in (closed, frozen)]
        told = run_ranks(sync_with, 2, urls, trained.old)
    assert told[0][:2] == told[1][:2]
    for message, engines, seconds in told:
        assert set(engines) == set(urls)
        assert f"{urls[0]}: init_weight_transfer_engine failed: the server died, froze, or cannot be reached" in message
        assert f"{urls[1]}: no answer to init_weight_transfer_engine within 4 s: the engine died, froze" in message
        assert "rank" not in message
        assert seconds < 8
