"""Live weights into engines in this process: generation after a sync is that of a fresh engine with those weights."""

import decoder
import pytest
import support.vllm_required  # noqa: F401
import torch
from support.engines import engine, greedy
from support.models.tiny import VOCAB, save_tiny

import polyshard as ps
from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.transfer import local
from polyshard.adapters.vllm.transfer.source import LayoutSource

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40)), list(range(40))]  # the last meets the prefix cache
TOKENS = 8
TIED = {"untied": False, "tied": True}


LIBRARIES = ("torch", "megatron", "deepspeed", "fairscale")


class Trained:
    """A checkpoint to start engines from, and a trainer whose weights have moved on."""

    def __init__(self, folder, tied):
        self.old = save_tiny(folder / "old", "qwen3", head_dim=32, tie_word_embeddings=tied)
        self.context = ps.initialize("torch")
        self.model = decoder.build_model(ps.read_config(self.old), self.context)
        ps.load_checkpoint(self.model, self.old, self.context)
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.new = ps.save_checkpoint(self.model, folder / "new", self.context, config=ps.read_config(self.old))
        self._fresh = {}

    def fresh(self, name, **options):
        """What an engine generates that has loaded the new weights from disk."""
        key = (name, str(options))
        if key not in self._fresh:
            with engine(self.new, name, **options) as llm:
                self._fresh[key] = greedy(llm, PROMPTS, TOKENS)
        return self._fresh[key]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return {name: Trained(tmp_path_factory.mktemp(name), tied) for name, tied in TIED.items()}


@pytest.fixture(autouse=True)
def registered():
    for adapter in ("vllm", *LIBRARIES):
        ps.register_model(f"Live{adapter}", decoder.build_model, adapter=adapter)


SERVED = {
    "vLLM's layers": "Livevllm",
    **{f"{library}'s layers": f"Live{library}" for library in LIBRARIES},
    "vLLM's own model": None,
}


# How a piece is moved is the same for all libraries: each way and each head, and for these three all of them together.
ALL_TOGETHER = ("vLLM's layers", "torch's layers", "vLLM's own model")


@pytest.mark.parametrize(
    ("served", "share", "tied"),
    [
        pytest.param(served, share, tied, id=f"{served}-{'shared' if share else 'copied'}-{tied}")
        for served in SERVED
        for share in (True, False)
        for tied in TIED
        if served in ALL_TOGETHER or share == (tied == "tied")
    ],
)
def test_after_a_sync_an_engine_generates_as_a_fresh_one(trained, served, share, tied):
    case, name = trained[tied], SERVED[served]
    want = case.fresh(name)
    with engine(case.old, name, enable_prefix_caching=True) as llm:
        old = greedy(llm, PROMPTS, TOKENS)
        with ps.WeightSync(case.model, case.context, llm, share=share) as sync:
            first = sync("one")
            assert greedy(llm, PROMPTS, TOKENS) == want
            assert sync("two").version == llm.llm_engine.get_weight_version() == "two"
            assert greedy(llm, PROMPTS, TOKENS) == want
            if first.shared_bytes:  # vLLM's reload copies into the memory that a layer had before
                weights = [parameter.clone() for parameter in case.model.parameters()]
                llm.collective_rpc("reload_weights")
                llm.reset_prefix_cache()
                assert greedy(llm, PROMPTS, TOKENS) == old
                assert all(torch.equal(a, b) for a, b in zip(case.model.parameters(), weights))
    assert old != want
    assert (first.shared_bytes > 0) == (share and name is not None)


def test_two_engines_of_two_kinds_at_once(trained):
    case = trained["untied"]
    want = [case.fresh(name) for name in ("Livevllm", None)]
    with engine(case.old, "Livevllm") as first, engine(case.old, None) as second:
        ps.WeightSync(case.model, case.context, [first, second], bucket_bytes=10_000)()
        assert [greedy(llm, PROMPTS, TOKENS) for llm in (first, second)] == want


def test_an_engine_in_bfloat16_and_a_trainer_in_float32(trained):
    case = trained["untied"]
    want = case.fresh("Livevllm", dtype="bfloat16")
    with engine(case.old, "Livevllm", dtype="bfloat16") as llm:
        report = ps.WeightSync(case.model, case.context, llm, bucket_bytes=10_000)()
        assert greedy(llm, PROMPTS, TOKENS) == want
    assert report.shared_bytes == 0, "another dtype needs its own memory"
    assert report.nbytes == 2 * sum(parameter.numel() for parameter in case.model.parameters())


def test_shared_memory_refuses_between_a_step_and_the_next_sync(trained):
    case = trained["tied"]
    model = decoder.build_model(ps.read_config(case.old), case.context)
    ps.load_checkpoint(model, case.old, case.context)
    trainer = ps.load_adapter("torch").engine(model, ps.AdamW(lr=0.05), case.context)
    ids = torch.arange(24).reshape(2, 12)
    with engine(case.old, "Livetorch") as llm, ps.WeightSync(trainer, case.context, llm) as sync:
        assert sync().shared_bytes == sync().nbytes, "everything is shared"
        before = greedy(llm, PROMPTS, TOKENS)
        trainer.backward(trainer(ids, labels=ids))
        trainer.step()
        with pytest.raises(ps.WeightSyncError, match="the trainer has changed its weights since the last sync"):
            greedy(llm, PROMPTS[:1], TOKENS)
        sync()
        after = greedy(llm, PROMPTS, TOKENS)
        assert len(after) == len(PROMPTS), "the refused request is gone"
        assert after != before


def receiver_of(llm):
    worker = compat.local_worker(llm)
    return compat_receiver(worker)


def compat_receiver(worker):
    from polyshard.adapters.vllm.transfer.receiver import receiver_for

    return receiver_for(worker.model, worker.vllm_config)


def test_a_half_updated_model_refuses_and_a_complete_sync_mends_it(trained):
    case = trained["untied"]
    source = dict(LayoutSource(case.model, case.context))
    with engine(case.old, "Livevllm") as llm:
        receiver = receiver_of(llm)
        receiver.begin("cut off")
        names = list(source)
        receiver.load({name: source[name] for name in names[:5]})
        with pytest.raises(ps.WeightSyncError, match="update to weights 'cut off' has begun and is not finished"):
            greedy(llm, PROMPTS[:1], TOKENS)
        with pytest.raises(ps.WeightSyncError, match=r"lacks 20 tensors: model.layers"):
            receiver.finish()
        ps.WeightSync(case.model, case.context, llm)()
        assert greedy(llm, PROMPTS, TOKENS) == case.fresh("Livevllm")


def test_what_does_not_fit_is_named(trained):
    case = trained["untied"]
    source = dict(LayoutSource(case.model, case.context))
    name = "model.layers.1.mlp.up_proj.weight"
    other = ps.ModelConfig(
        **{**ps.read_config(case.old).to_dict(), "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    with engine(case.old, "Livevllm") as llm:
        with pytest.raises(ps.ConfigurationError, match=r"rotary_frequencies .* in the trainer and .* in engine 0"):
            ps.WeightSync(decoder.build_model(other, case.context), case.context, llm)
        receiver = receiver_of(llm)
        for sent, message in (
            ({"model.extra": torch.ones(2)}, "'model.extra' is not a weight of model 'Livevllm'"),
            (
                {name: torch.ones(3, 3)},
                rf"'{name}' has the wrong shape .*'Livevllm': got \[3, 3\], expected \[80, 48\]",
            ),
        ):
            receiver.begin("x")
            with pytest.raises(ps.WeightSyncError, match=message):
                receiver.load(sent)
        receiver.begin("x")
        receiver.load({name: source[name]})
        with pytest.raises(ps.WeightSyncError, match=f"'{name}' was sent twice in one update") as caught:
            receiver.load({name: source[name]})
        assert caught.value.tensors == (name,)


@pytest.mark.parametrize("path", ["directly", "through the bucket"])
def test_a_damaged_tensor_is_named_with_its_worker(trained, path, monkeypatch):
    case = trained["untied"]
    from polyshard.adapters.vllm.transfer import receiver as room

    victim = "model.layers.1.self_attn.k_proj.weight"
    original = room.take_region

    def damaging(region, shard, values):
        moved = original(region, shard, values)
        if region.name != victim:
            return moved
        with torch.no_grad():
            region.view(shard)[3, 4] += 1e-6
        return original(region, shard, region.view(shard).clone())

    with engine(case.old, "Livevllm") as llm:
        sync = ps.WeightSync(case.model, case.context, llm, share=False)
        if path == "through the bucket":
            monkeypatch.setattr(local.LocalEngine, "loads_directly", lambda *_: set())
            sync = ps.WeightSync(case.model, case.context, llm)
        for module in (room, local):
            monkeypatch.setattr(module, "take_region", damaging)
        with pytest.raises(ps.WeightSyncError, match=rf"'{victim}' arrived damaged in .*worker") as caught:
            sync()
        assert caught.value.tensors == (victim,)
        with pytest.raises(ps.WeightSyncError, match="refuses to generate"):
            greedy(llm, PROMPTS[:1], TOKENS)
        monkeypatch.undo()
        sync()
        assert greedy(llm, PROMPTS, TOKENS) == case.fresh("Livevllm")


def test_a_damaged_last_tensor_is_not_served_by_an_engine_apart(trained, monkeypatch):
    """All tensors have come, and the workers cannot know that one is damaged: the trainer tells them."""
    from polyshard.adapters.vllm.transfer import receiver as room

    case, original = trained["untied"], room.take_region
    monkeypatch.setattr(compat, "local_worker", lambda llm: None)  # drive it as one in processes of its own

    def damaging(region, shard, values):
        return original(region, shard, values + 1 if region.name == "lm_head.weight" else values)

    with (
        engine(case.old, "Livevllm", weight_transfer_config={"backend": "polyshard"}) as llm,
        ps.WeightSync(case.model, case.context, llm, bucket_bytes=20_000) as sync,
    ):
        monkeypatch.setattr(room, "take_region", damaging)
        with pytest.raises(ps.WeightSyncError, match=r"'lm_head.weight' arrived damaged in worker 0 of engine 0"):
            sync()
        with pytest.raises(ps.WeightSyncError, match="refuses to generate.*was abandoned by its trainer"):
            greedy(llm, PROMPTS[:1], TOKENS)
        monkeypatch.setattr(room, "take_region", original)
        sync()
        assert greedy(llm, PROMPTS, TOKENS) == case.fresh("Livevllm")


def test_an_engine_apart_has_to_be_started_for_it(trained, monkeypatch):
    case = trained["untied"]
    monkeypatch.setattr(compat, "local_worker", lambda llm: None)
    with (
        engine(case.old, "Livevllm") as llm,
        pytest.raises(
            ps.ConfigurationError, match="Start it with LLM.*weight_transfer_config={'backend': 'polyshard'}"
        ),
    ):
        ps.WeightSync(case.model, case.context, llm)


def test_an_engine_with_unfinished_requests_is_not_touched(trained):
    from vllm import SamplingParams

    case = trained["untied"]
    with engine(case.old, "Livevllm") as llm:
        sync = ps.WeightSync(case.model, case.context, llm)
        llm.llm_engine.add_request(
            "7", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=20, detokenize=False)
        )
        llm.llm_engine.step()
        with pytest.raises(
            ps.WeightSyncError, match="has 1 unfinished requests: their KV cache .* with the old weights"
        ):
            sync()
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        sync()


def test_without_an_engine_there_is_nothing_to_do(trained):
    case = trained["untied"]
    with pytest.raises(ps.ConfigurationError, match="the engines must have one dtype: got no engines"):
        ps.WeightSync(case.model, case.context, [])


def declared_by(source):
    return source.metadata() if callable(source.metadata) else source.metadata  # vLLM 0.33: a property


def test_the_source_for_vllms_own_backends_yields_what_it_declares(trained):
    from safetensors.torch import load_file

    case = trained["tied"]
    source = LayoutSource(case.model, case.context, torch.bfloat16)
    declared = [(meta.name, meta.dtype, meta.shape) for meta in declared_by(source)]
    assert declared == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
    want = load_file(case.new / "model.safetensors")
    assert all(torch.equal(tensor, want[name].bfloat16()) for name, tensor in source)
    names = [name for name, *_ in declared]
    if hasattr(source, "groups"):  # vLLM 0.32
        assert [name for group in source.groups() for name in group] == names
    else:  # since 0.33
        assert source.owned_names(0) == names
        assert source.implements_iter_full()
        assert [name for name, _ in source.iter_full()] == names


def test_buckets_of_dead_processes_are_removed_and_others_are_kept(tmp_path):
    import os
    import socket
    import subprocess

    from polyshard.adapters.vllm.transfer.bucket import remove_abandoned

    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    kept = [tmp_path / f"polyshard-{host}-{os.getpid()}-ab", tmp_path / f"polyshard-elsewhere-{dead.pid}-ab"]
    for path in (*kept, tmp_path / f"polyshard-{host}-{dead.pid}-ab"):
        path.touch()
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_what_a_connector_keeps_is_dropped_with_the_old_weights(trained, tmp_path):
    case = trained["untied"]
    prompts = [[token % VOCAB for token in range(200)]]  # more than a block of the cache
    disk = {
        "kv_connector": "DiskConnector",
        "kv_connector_module_path": "support.kv_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "kept")},
    }
    without_reset = {**disk, "kv_connector": "ExampleConnector", "kv_connector_module_path": None}
    with engine(case.new, "Livevllm") as llm:
        want = greedy(llm, prompts, TOKENS)
    with engine(case.old, "Livevllm", kv_transfer_config=disk) as llm:
        assert greedy(llm, prompts, TOKENS) != want
        assert list((tmp_path / "kept").iterdir())
        ps.WeightSync(case.model, case.context, llm)()
        assert greedy(llm, prompts, TOKENS) == want
    with (
        engine(case.old, "Livevllm", kv_transfer_config=without_reset) as llm,
        pytest.raises(ps.WeightSyncError, match="unsupported with the KV connector ExampleConnector: it has no reset"),
    ):
        ps.WeightSync(case.model, case.context, llm)
