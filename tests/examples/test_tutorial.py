"""The code blocks of the tutorial are run in the order of the page."""

import json
import re
import socket
import subprocess

import pytest
from support.pages import code_blocks, newcomer_with_files
from support.paths import ROOT
from support.servers import running_server

from polyshard.launch.ranks import free_port

pytestmark = pytest.mark.slow

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
SETUP, DOCTOR, TRAIN, FINE_TUNE, SERVE, SERVER, REQUEST, VERIFY, SYNC = code_blocks(TUTORIAL, "bash")
TRAINED, SYNCED = code_blocks(TUTORIAL, "text")
BY_ONES, BY_TWOS = "[25, 26, 27, 28, 29, 30]", "[26, 28, 30, 32, 34, 36]"


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    return newcomer_with_files(TUTORIAL, tmp_path_factory.mktemp("tutorial"))


def losses(printed):
    return [float(loss) for loss in re.findall(r"loss (\d\.\d+)", printed)]


def test_setup_is_a_target_of_the_makefile():
    assert SETUP == "make setup\nsource .venv/bin/activate\n"
    assert subprocess.run(["make", "-n", "setup"], cwd=ROOT, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def trained(newcomer):
    """The newcomer's directory after the two training scripts, and what they printed."""
    return newcomer, newcomer.types(TRAIN), newcomer.types(FINE_TUNE)


@pytest.mark.vllm
def test_doctor_finds_torch_and_vllm(newcomer):
    assert "vllm" in newcomer.types(DOCTOR)


def test_training_and_fine_tuning_reach_the_losses_of_the_page(trained):
    _, first, second = trained
    assert losses(first) == pytest.approx(losses(TRAINED), abs=0.02)
    assert losses(second)[-1] < 0.02


@pytest.mark.vllm
def test_the_engine_counts_by_twos(trained):
    newcomer, *_ = trained
    answer = f"after 20, 22, 24: {BY_TWOS}"
    assert f"`{answer}`" in TUTORIAL
    assert newcomer.types(SERVE).splitlines()[-1] == answer


@pytest.mark.vllm
def test_the_server_counts_by_twos(trained):
    newcomer, *_ = trained
    with socket.socket() as probe:
        port = 8000 if probe.connect_ex(("127.0.0.1", 8000)) else free_port()
    command = SERVER if port == 8000 else f"{SERVER.rstrip()} --port {port}"
    with running_server(
        ["bash", "-ec", command], port, newcomer.folder / "server.log", newcomer.env, cwd=newcomer.folder
    ):
        told = json.loads(newcomer.types(REQUEST.replace("8000", str(port))))
    assert told["choices"][0]["token_ids"] == json.loads(BY_TWOS)


@pytest.mark.vllm
@pytest.mark.timeout(500)
def test_trainer_and_server_are_the_same_model(trained):
    newcomer, *_ = trained
    rows = re.findall(r"│ (train|vLLM) .*│ equal │", newcomer.types(VERIFY, timeout=450))
    assert rows == ["train", "vLLM", "vLLM"]


@pytest.mark.vllm
def test_a_sync_brings_the_fine_tune_into_a_running_engine(trained):
    newcomer, *_ = trained
    assert f"before: {BY_ONES}\nafter: {BY_TWOS}\n" in SYNCED
    assert SYNCED in newcomer.types(SYNC)
