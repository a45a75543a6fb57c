"""What cannot be served ends in an error that says so, out of vLLM's own engine start."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import decoder
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import engine, greedy
from support.models import broken_factories
from support.models.tiny import save_tiny
from support.scripts import run

import polyshard as ps
from polyshard.registry import ENVIRONMENT_VARIABLE

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture
def directory(tmp_path):
    return save_tiny(tmp_path / "model", "llama", hidden_size=64, head_dim=32)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            broken_factories.raises,
            "The factory support.models.broken_factories:raises of model 'Broken' raised ZeroDivisionError: "
            "the user's bug",
        ),
        (broken_factories.gives_none, "returned the wrong type: got None, .* Add a return statement"),
        (broken_factories.gives_a_dict, "returned the wrong type: got dict, expected a torch.nn.Module"),
        (
            broken_factories.lacks_compute_logits,
            r"cannot be served: missing a method compute_logits\(hidden_states\)\. A served model needs",
        ),
        (broken_factories.wrong_forward, r"cannot be served: missing a forward that takes \(input_ids, positions\)"),
    ],
)
def test_a_factory_that_will_not_do(directory, factory, message):
    ps.register_model("Broken", factory)
    with pytest.raises(ps.RegistrationError, match=message), engine(directory, "Broken"):
        pass


def test_pooling_is_refused(directory):
    ps.register_model("Pooled", decoder.build_model)
    with (
        pytest.raises(ps.RegistrationError, match=r"'Pooled' cannot be served for embeddings.*runner='pooling'"),
        engine(directory, "Pooled", runner="pooling", convert="embed"),
    ):
        pass


@pytest.mark.parametrize("adapter", ["vllm", "torch"])
def test_a_checkpoint_that_does_not_fit(directory, adapter):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(3)
    tensors["model.stray"] = torch.ones(3)
    save_file(tensors, path, metadata={"format": "pt"})
    ps.register_model("Unfit", decoder.build_model, adapter=adapter)
    with pytest.raises(ps.CheckpointError) as caught, engine(directory, "Unfit"):
        pass
    for part in (
        "missing model.layers.0.mlp.up_proj.weight",
        "model.norm.weight has the wrong shape: got [3], expected [64]",
        "unexpected model.stray",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(directory, bad):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    ps.register_model("NotFinite", decoder.build_model)
    with (
        pytest.raises(ps.CheckpointError, match=r"NaN or infinity in \S*layers.1.mlp.\S+ \(1 of \d+ values\)"),
        engine(directory, "NotFinite"),
    ):
        pass


WORKERS = """
import json, sys
from multiprocessing import resource_tracker
import polyshard as ps

if __name__ == "__main__":
    from vllm import LLM
    import psutil

    directory, factory, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    ps.register_model("Broken", factory)
    try:
        with ps.engine_errors():
            LLM(directory, hf_overrides={"architectures": ["Broken"]}, dtype="float32", max_model_len=256,
                enforce_eager=True, kv_cache_memory_bytes=64 << 20, skip_tokenizer_init=True,
                tensor_parallel_size=size)
    except Exception as error:
        found = [type(error).__name__, str(error), "".join(error.__notes__)]
    children = psutil.Process().children(recursive=True)
    tracker = resource_tracker._resource_tracker._pid  # Python's own; it ends with this process
    gone, alive = psutil.wait_procs([child for child in children if child.pid != tracker], timeout=20)
    print("RESULT" + json.dumps([*found, [child.cmdline() for child in alive]]))
"""


@contextlib.contextmanager
def shared_memory_of(script):
    """Collect the names in /dev/shm that the processes of a script map while the block runs.

    Comparing the whole of /dev/shm would count what other tests beside this one make, or leave when they kill.
    """
    names, ended = set(), threading.Event()

    def processes():
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children():
                if str(script) in child.cmdline():
                    yield from (child, *child.children(recursive=True))

    def watch():
        while not ended.wait(0.5):
            for process in processes():
                with contextlib.suppress(OSError):
                    names.update(re.findall(r"/dev/shm/(\S+)", Path(f"/proc/{process.pid}/maps").read_text()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield names
    finally:
        ended.set()
        thread.join()


def left_behind(names, seconds=20):
    """Return those of the names that are still in /dev/shm after at most this time.

    vLLM on CPU leaves its own `cpushm` segments if it ends its workers by a signal, which it does where they are slow.
    """
    names = {name for name in names if "cpushm" not in name}
    until = time.monotonic() + seconds
    while (found := names & set(os.listdir("/dev/shm"))) and time.monotonic() < until:
        time.sleep(0.5)
    return found


def test_worker_processes_tell_their_parent_why(directory, tmp_path):
    """... and nothing of the engine is left: no process, no shared memory."""
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    with shared_memory_of(script) as names:
        found, told, notes, alive = run(
            [sys.executable, str(script), str(directory), "support.models.broken_factories:three_heads", "2"],
            VLLM_ENABLE_V1_MULTIPROCESSING="1",
            VLLM_CPU_KVCACHE_SPACE="1",
        )
    assert re.search(r"ranks 0, 1 of the engine: .*three_heads.* raised LayoutError: .* 3 key-value heads", told), told
    assert found in ("LayoutError", "RegistrationError")
    assert "Traceback" in notes
    assert not alive
    assert any(name.startswith("psm_") for name in names)
    assert not left_behind(names)


def test_a_head_dimension_that_vllm_does_not_have(tmp_path):
    directory = save_tiny(tmp_path / "model", "llama", hidden_size=48, head_dim=520)
    ps.register_model("LargeHeads", decoder.build_model)
    with pytest.raises(Exception, match=r"(?i)head.*(size|dim).*520"), engine(directory, "LargeHeads"):
        pass


def test_a_reference_that_cannot_be_imported_is_named_by_vllm_itself(directory, monkeypatch):
    """vLLM swallows a plugin's ImportError and would go on to 'unknown architecture'."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '{"Gone": "nowhere.at.all:build"}')
    code = f"from vllm import LLM; LLM({str(directory)!r}, hf_overrides={{'architectures': ['Gone']}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert (
        "RegistrationError: 'nowhere.at.all:build': importing 'nowhere.at.all' raised ModuleNotFoundError"
        in done.stderr
    )


def test_embeddings_as_prompts(directory):
    ps.register_model("Embeddings", decoder.build_model)
    from vllm import SamplingParams

    with engine(directory, "Embeddings", enable_prompt_embeds=True) as llm:
        ids = [5, 9, 2, 40]
        want = greedy(llm, [ids], 6)[0][0]
        table = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
        prompt = {"prompt_embeds": table[torch.tensor(ids)]}
        output = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True), use_tqdm=False)
        assert list(output[0].outputs[0].token_ids) == want
