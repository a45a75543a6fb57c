"""Checkpoints on a remote file system: a real S3 server, to which two ranks write that share no directory."""

import filecmp
import json
import os
import signal
import tempfile
from multiprocessing import get_context
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import polyshard
from support.models.tiny import save_tiny
from support.object_store import BUCKET, object_store

import polyshard as ps
from polyshard.checkpoint.location import as_path
from polyshard.checkpoint.manifest import MANIFEST, read_manifest
from polyshard.checkpoint.remote import ownership, publish
from polyshard.convert import convert
from polyshard.testing import run_ranks
from polyshard.testing.model import SuiteConfig, SuiteModel

pytest.importorskip("moto")
from werkzeug.exceptions import Forbidden

ROOT = f"s3://{BUCKET}"
BASE = f"{ROOT}/base"


@pytest.fixture(scope="module")
def store():
    with object_store() as running:
        yield running


def files_of(url):
    root = as_path(url)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def build(context, seed):
    ps.manual_seed(seed, context)
    model = SuiteModel(SuiteConfig(), context)
    return ps.load_adapter("torch").engine(model, ps.AdamW(), context, data_parallel="fsdp")


def shards(engine):
    state = engine.optimizer_state()
    return [piece.values.clone() for piece in (*engine.weight_pieces(), *state.pieces)]


def save_and_load(settings, url, shared):
    os.environ.update(settings)
    os.environ["TMPDIR"] = tempfile.mkdtemp(dir=shared)  # each rank has a disk of its own
    tempfile.tempdir = None
    context = ps.initialize("torch", timeout=60)
    engine = build(context, seed=1)
    model = {"config": {"a": 1}, "data": {"row": 7}, "max_shard_bytes": 20_000, "companions": BASE}
    ps.save_training_state(engine, shared / "state", context, step=3, **model)
    returned = ps.save_training_state(engine, f"{url}/step-3", context, step=3, **model)
    assert str(returned) == f"{url}/step-3"
    assert not any(Path(os.environ["TMPDIR"]).iterdir()), "nothing is left on the local disk"
    pending = ps.save_training_state(engine, f"{url}/step-4", context, step=4, asynchronous=True, **model)
    expected = shards(engine)
    assert str(pending.wait()) == f"{url}/step-4"

    found = ps.latest_checkpoint(url)
    assert str(found) == f"{url}/step-4"
    other = build(context, seed=2)
    assert not all(torch.equal(a, b) for a, b in zip(shards(other), expected, strict=True))
    state = ps.load_training_state(other, f"{url}/step-3", context)
    assert (state.step, state.data) == (3, {"row": 7})
    assert all(torch.equal(a, b) for a, b in zip(shards(other), expected, strict=True))
    ps.shutdown(context)
    return True


def fill_base():
    """Write a model's directory, with companion files, weights that no save may read, and a run's own files."""
    files = {"config.json": b"{}", "tokenizer.json": b"{1}", "chat_templates/tool.jinja": b"{{ x }}"}
    for name, content in {**files, "model.safetensors": b"weights", "logs/a.txt": b"1"}.items():
        fsspec.filesystem("s3").pipe_file(f"{BASE}/{name}", content)


@pytest.fixture(scope="module")
def saved(store, tmp_path_factory):
    """A training state of two ranks, saved to the store and to a local directory."""
    folder = tmp_path_factory.mktemp("remote")
    fill_base()
    assert run_ranks(save_and_load, 2, store.settings, f"{ROOT}/runs", folder) == [True, True]
    return folder / "state", f"{ROOT}/runs/step-3"


def test_a_remote_state_has_the_bytes_of_a_local_one(saved, tmp_path):
    local, url = saved
    copied = ps.download_checkpoint(url, tmp_path / "copied")
    names = sorted(str(path.relative_to(local)) for path in local.rglob("*") if path.is_file())
    assert files_of(url) == names
    assert (copied / "chat_templates/tool.jinja").read_text() == "{{ x }}"
    assert {"tokenizer.json", "logs/a.txt"} & set(names) == {"tokenizer.json"}
    assert len([name for name in names if name.startswith("model-")]) > 2, "both ranks have files to write"
    assert filecmp.cmpfiles(local, copied, names, shallow=False) == (names, [], [])


def test_it_loads_at_another_size_and_converts(saved, tmp_path):
    local, url = saved
    context = ps.initialize("torch")
    model = SuiteModel(SuiteConfig(), context)
    ps.load_checkpoint(model, url, context)
    assert ps.read_config(url).a == 1
    expected = {name: value for file in local.glob("model-*.safetensors") for name, value in load_file(file).items()}
    again = ps.save_checkpoint(model, tmp_path / "again", context, config={})
    assert {n: v.tolist() for n, v in load_file(again / "model.safetensors").items()} == {
        n: v.tolist() for n, v in expected.items()
    }
    there, back = f"{ROOT}/converted", tmp_path / "back"
    convert(url, there, dtype=torch.bfloat16)
    convert(there, back)
    for name, value in load_file(back / "model.safetensors").items():
        assert torch.equal(value, expected[name].bfloat16())


def test_what_is_damaged_is_refused_and_skipped(saved):
    fs, context = fsspec.filesystem("s3"), ps.initialize("torch")
    _, url = saved
    damaged = f"{ROOT}/damaged/step-9"
    fs.copy(url, damaged, recursive=True)
    name = next(name for name in files_of(damaged) if name.startswith("model-"))
    content = fs.cat_file(f"{damaged}/{name}")
    model = SuiteModel(SuiteConfig(), context)

    fs.pipe_file(f"{damaged}/{name}", content[:-4] + b"\1\2\3\4")
    with pytest.raises(ps.CheckpointError, match=rf"the checksum of {name} is not the recorded one"):
        ps.load_checkpoint(model, damaged, context)
    fs.pipe_file(f"{damaged}/{name}", content[:-4])
    with pytest.raises(ps.CheckpointError, match=r"is truncated or not a safetensors file"):
        ps.load_checkpoint(model, damaged, context)
    assert ps.latest_checkpoint(f"{ROOT}/damaged") is None
    fs.pipe_file(f"{damaged}/{name}", content)
    assert ps.latest_checkpoint(f"{ROOT}/damaged") is not None


def test_a_config_and_an_adapter_are_written_and_read_at_a_url(store):
    peft, context = pytest.importorskip("peft"), ps.initialize("torch")
    assert str(ps.save_config(f"{ROOT}/config", {"hidden_size": 8}, architecture="Mine")) == f"{ROOT}/config"
    assert (ps.read_config(f"{ROOT}/config").architectures, files_of(f"{ROOT}/config")) == (["Mine"], ["config.json"])

    def adapted(seed, **changes):
        model = torch.nn.ModuleDict({"up_proj": ps.column_parallel(4, 8, context)})
        config = peft.LoraConfig(r=2, target_modules=["up_proj"], **changes)
        return ps.add_lora(model, config, context, seed=seed)

    saved, loaded = adapted(1), adapted(2)
    url = ps.save_lora(saved, f"{ROOT}/adapter", context)
    ps.load_lora(loaded, str(url), context)
    matrices = [[v for n, v in model.state_dict().items() if "lora" in n] for model in (saved, loaded)]
    assert len(matrices[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*matrices, strict=True))
    merged = ps.save_merged_lora(saved, f"{ROOT}/merged", context, config={})
    assert (str(merged), "model.safetensors" in files_of(merged)) == (f"{ROOT}/merged", True)
    with pytest.raises(ps.CheckpointError, match="s3://bucket/adapter has another scaling than the model"):
        ps.load_lora(adapted(2, lora_alpha=64), url, context)
    with pytest.raises(ps.CheckpointError, match="s3://bucket/config holds no LoRA adapter"):
        ps.load_lora(loaded, f"{ROOT}/config", context)


def test_serve_downloads_a_checkpoint_once(store, tmp_path):
    from polyshard.cli.download import downloaded

    context, url, here = ps.initialize("torch"), f"{ROOT}/served", tmp_path / "served"
    ps.save_checkpoint(torch.nn.Linear(2, 2), url, context, config={"a": 1})
    read = []
    store.watcher = lambda method, path: read.append(path)
    assert downloaded(url, here) == here
    assert any(path.endswith("model.safetensors") for path in read)
    read.clear()
    downloaded(url, here)
    assert not any(path.endswith("model.safetensors") for path in read)
    store.watcher = None
    (here / "model.safetensors").write_bytes(b"torn")
    downloaded(url, here)
    ps.load_checkpoint(torch.nn.Linear(2, 2), here, context)
    ps.save_checkpoint(torch.nn.Linear(2, 2), url, context, config={"a": 2})
    assert ps.read_config(downloaded(url, here)).a == 2
    with pytest.raises(ps.CheckpointError, match="url must be of a remote file system"):
        downloaded(str(here), tmp_path / "other")


def test_companions_are_read_from_a_url_or_the_save_changes_nothing(store, tmp_path):
    context, model, read = ps.initialize("torch"), torch.nn.Linear(2, 2), []
    fill_base()

    def save(companions):
        return ps.save_checkpoint(model, tmp_path / "model", context, config={"a": 1}, companions=companions)

    store.watcher = lambda method, path: read.append(path)
    directory = save(BASE)
    assert (directory / "tokenizer.json").read_text() == "{1}"
    assert not any(path.endswith("base/model.safetensors") for path in read)

    def refuse(method, path):
        if method == "GET" and path.endswith("tool.jinja"):
            raise Forbidden

    store.watcher = refuse
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    with pytest.raises(ps.CheckpointError, match=r"companion files of s3://bucket/base cannot be copied"):
        save(BASE)
    store.watcher = None
    with pytest.raises(ps.CheckpointError, match=r"companions is invalid: got s3://bucket/nothing, expected a direct"):
        save(f"{ROOT}/nothing")
    with pytest.raises(ps.CheckpointError, match=r"companions is invalid: got .*nowhere, expected a directory"):
        save(tmp_path / "nowhere")
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_verify_takes_a_url(store, tmp_path, capfd):
    url, here = f"{ROOT}/verified", tmp_path / "copy"
    save_tiny(tmp_path / "model", "qwen3", hidden_size=64, head_dim=32)
    fsspec.filesystem("s3").put(str(tmp_path / "model"), url, recursive=True)
    options = ("--factory", "decoder:build_model", "--adapters", "torch", "--tensor-parallel", "1", "--json")
    done = polyshard(capfd, "verify", "--model", url, *options, "--download", here)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["model"], len(found["rows"])) == (url, 1)
    assert (here / "config.json").is_file()
    done = polyshard(capfd, "verify", "--model", f"{ROOT}/nothing", *options)
    assert "s3://bucket/nothing is not a directory" in done.stderr


def test_urls_where_only_local_files_work_are_refused(saved, tmp_path):
    from polyshard.cli.serve import server_command

    _, url = saved
    context = ps.initialize("torch")
    with pytest.raises(ps.CheckpointError, match=r"must be local.*Pass --download"):
        server_command(url, None, False, [])
    with pytest.raises(ps.CheckpointError, match=r"is a URL that was made a pathlib\.Path"):
        ps.read_config(Path(url))
    with pytest.raises(ps.CheckpointError, match="s3:/bucket/run is a URL that lacks a slash. Write ://"):
        ps.save_checkpoint(torch.nn.Linear(2, 2), "s3:/bucket/run", context, config={})
    with pytest.raises(ps.CheckpointError, match="is not a URL that fsspec knows"):
        ps.read_config("nosuch://bucket/model")
    with pytest.raises(ps.CheckpointError, match="megatron-torch-dist can be written to a local directory only"):
        convert(url, f"{ROOT}/megatron", to_format="megatron-torch-dist")
    with pytest.raises(ps.CheckpointError, match=r"saving s3://no-bucket/x failed.*bucket"):
        ps.save_checkpoint(torch.nn.Linear(2, 2), "s3://no-bucket/x", context, config={})


def save_into_a_memory_of_its_own(folder):
    context = ps.initialize("torch", tensor=2, timeout=30)
    model = SuiteModel(SuiteConfig(), context)
    with pytest.raises(ps.CheckpointError, match=r"saving is missing, which .* All ranks must see the same file"):
        ps.save_checkpoint(model, "memory://run/model", context, config={}, max_shard_bytes=20_000)
    own = folder / str(context.rank)  # as on machines that share no disk
    with pytest.raises(ps.CheckpointError, match=r"this rank does not see the directory that rank 0 has created"):
        ps.save_checkpoint(model, own / "model", context, config={})
    (folder / "file").touch()
    tempfile.tempdir = str(folder / "file" / "disk") if context.rank == 1 else None
    with pytest.raises(ps.CheckpointError, match=r"nothing was changed: rank 1: NotADirectoryError: .*file/disk"):
        ps.save_checkpoint(model, "memory://run/other", context, config={})
    return True


def test_ranks_that_do_not_see_one_file_system_are_told(tmp_path):
    assert run_ranks(save_into_a_memory_of_its_own, 2, tmp_path) == [True, True]


def filled(value):
    model = torch.nn.Linear(4, 4)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def writers(settings, pipe):
    """Start a process that saves for each request of the pipe; it has its libraries from this one."""
    os.environ.update(settings)
    import s3fs  # noqa: F401
    import upath  # noqa: F401

    context = ps.initialize("torch")
    while True:
        url, value = pipe.recv()
        writer = os.fork()
        if writer == 0:
            pipe.send(os.getpid())
            pipe.recv()
            ps.save_checkpoint(filled(value), url, context, config={"a": value})
            os._exit(0)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]))


@pytest.fixture(scope="module")
def writer_pipe(store):
    spawn = get_context("forkserver")
    here, there = spawn.Pipe()
    process = spawn.Process(target=writers, args=(store.settings, there), daemon=True)
    process.start()
    yield here
    process.kill()
    process.join()


def value_of(url):
    """The value that every element of the checkpoint has, by its manifest and every byte; None without one."""
    found = ps.latest_checkpoint(url)
    if found is None:
        return None
    context = ps.initialize("torch")
    model = torch.nn.Linear(4, 4)
    ps.load_checkpoint(model, found, context)
    values = {value for parameter in model.parameters() for value in parameter.flatten().tolist()}
    assert len(values) == 1, f"a mixture of checkpoints: {values}"
    assert ps.read_config(found).a in values
    return values.pop()


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces"])
def test_killed_before_any_request_the_checkpoint_before_stays(store, writer_pipe, replaces):
    """A writer gets SIGKILL at its first request that changes something, the next one at its second, and so on."""
    root = f"{ROOT}/killed-{replaces}"
    if replaces:
        ps.save_checkpoint(filled(0.0), f"{root}/model", ps.initialize("torch"), config={"a": 0.0})
    seen = 0.0 if replaces else None
    for allowed in range(100):
        writer_pipe.send((f"{root}/model", allowed + 1.0))
        writer, changes = writer_pipe.recv(), []

        def kill_at(method, path, writer=writer, changes=changes, allowed=allowed):
            if method in ("PUT", "POST", "DELETE"):
                changes.append(path)
                if len(changes) > allowed:
                    os.kill(writer, signal.SIGKILL)
                    raise Forbidden

        store.watcher = kill_at
        writer_pipe.send("go")
        code = writer_pipe.recv()
        store.watcher = None
        assert code in (0, -signal.SIGKILL)
        value = value_of(root)
        assert value in (seen, allowed + 1.0), f"killed at change {allowed}: {changes}"
        assert seen is None or value is not None, "a checkpoint was lost"
        seen = value
        if code == 0:
            break
    assert code == 0
    assert allowed >= (11 if replaces else 5), "the writer was killed at many places"
    assert seen == allowed + 1.0
    assert files_of(root) == [f"model/{name}" for name in ("config.json", "model.safetensors", MANIFEST)]


@pytest.mark.parametrize("name", [".model.saving-first", ".model.saving-second"])
def test_the_marker_tells_which_of_two_killed_saves_is_read(store, name):
    """A store's times of change are too coarse to tell which is newer."""
    context, root = ps.initialize("torch"), f"{ROOT}/two"
    for value, saving in ((1.0, ".model.saving-first"), (2.0, ".model.saving-second")):
        ps.save_checkpoint(filled(value), f"{root}/{saving}", context, config={"a": value})
    ownership.mark(as_path(f"{root}/model"), name, complete=True)
    assert value_of(root) == (1.0 if name.endswith("first") else 2.0)


@pytest.mark.parametrize(
    ("at", "replaces", "kept"),
    [("model.safetensors", False, None), ("model.safetensors", True, 2.0)],
    ids=["while a file is on its way", "while files are replaced"],
)
def test_of_two_runs_that_save_to_one_url_one_is_told(store, tmp_path, at, replaces, kept):
    """A job that was started again while its first run is alive: both write files of the same names and sizes."""
    context, url = ps.initialize("torch"), f"{ROOT}/contested-{at}-{replaces}/model"
    if replaces:
        ps.save_checkpoint(filled(0.0), url, context, config={"a": 0.0})
    for value in (1.0, 2.0):
        ps.save_checkpoint(filled(value), tmp_path / str(value), context, config={"a": value})
    requests = []

    def the_other_saves_now(method, path):
        if method == "PUT" and path.endswith(f"/model/{at}"):
            requests.append(path)
            if len(requests) == 1:
                ps.upload_checkpoint(tmp_path / "2.0", url)

    store.watcher = the_other_saves_now
    with pytest.raises(ps.CheckpointError, match="another save (writes|has written|has finished) .*contested"):
        ps.upload_checkpoint(tmp_path / "1.0", url)
    store.watcher = None
    assert value_of(url.rsplit("/", 1)[0]) == kept
    if kept is None:
        with pytest.raises(ps.CheckpointError, match="is incomplete"):
            ps.load_checkpoint(filled(0.0), url, context)


def test_a_save_writes_no_more_to_a_directory_that_another_has_taken_over(store, tmp_path):
    context, url = ps.initialize("torch"), f"{ROOT}/taken/model"
    saved = ps.save_checkpoint(filled(1.0), tmp_path / "model", context, config={"a": 1.0})
    first = publish.begin_upload(as_path(url), ".model.saving-first", ())
    ps.save_checkpoint(filled(2.0), url, context, config={"a": 2.0})
    with pytest.raises(ps.CheckpointError, match="another save writes .*taken/model at the same time"):
        publish.upload(saved, read_manifest(saved).files, first)
    publish.withdraw(first)
    assert value_of(f"{ROOT}/taken") == 2.0


def test_in_a_directory_of_another_program_weights_are_replaced_when_all_new_ones_are_there(store, tmp_path):
    context, url = ps.initialize("torch"), f"{ROOT}/foreign"
    weight = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    save_file(weight, tmp_path / "model.safetensors")
    fsspec.filesystem("s3").put_file(str(tmp_path / "model.safetensors"), f"{url}/model.safetensors")
    fsspec.filesystem("s3").pipe_file(f"{url}/old.txt", b"old")
    model = torch.nn.Linear(2, 2)
    ps.load_checkpoint(model, url, context)
    assert model.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]

    def fail(method, path):
        if method == "PUT" and path.endswith("config.json"):
            raise Forbidden

    store.watcher = fail
    with pytest.raises(ps.CheckpointError, match=r"saving .*foreign failed; nothing was changed: .*Forbidden"):
        ps.save_checkpoint(model, url, context, config={})
    store.watcher = None
    assert files_of(url) == ["model.safetensors", "old.txt"]
    for _ in range(2):
        ps.save_checkpoint(torch.nn.Linear(2, 2), url, context, config={})
        assert files_of(url) == ["config.json", "model.safetensors", "old.txt", "polyshard.json"]
    fsspec.filesystem("s3").pipe_file(f"{url}/other.safetensors", b"old")
    with pytest.raises(ps.CheckpointError, match="holds weights that are not part of a checkpoint.*other.safetensors"):
        ps.save_checkpoint(model, url, context, config={})
    assert len(files_of(url)) == 5
    ps.load_checkpoint(model, url, context)


def test_a_killed_replacement_leaves_no_file_of_the_old_checkpoint_to_the_next(store):
    context, url = ps.initialize("torch"), f"{ROOT}/twice"
    old = torch.nn.Sequential(torch.nn.Linear(200, 2), torch.nn.Linear(2, 200))
    ps.save_checkpoint(old, url, context, config={}, max_shard_bytes=1700)
    fsspec.filesystem("s3").pipe_file(f"{url}/notes.txt", b"kept")
    assert "model-00002-of-00003.safetensors" in files_of(url)

    def fail_to_remove_the_weights(method, path):
        if method == "POST" and path.strip("/") == BUCKET:  # several files at once; the manifest is removed before
            raise Forbidden

    store.watcher = fail_to_remove_the_weights
    with pytest.raises(ps.CheckpointError):
        ps.save_checkpoint(torch.nn.Linear(2, 2), url, context, config={})
    store.watcher = None
    ps.save_checkpoint(torch.nn.Linear(2, 2), url, context, config={})
    assert files_of(url) == ["config.json", "model.safetensors", "notes.txt", "polyshard.json"]
