"""Every code block of the README is run; make targets and the installation are checked against the Makefile."""

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

README = (ROOT / "README.md").read_text()


def blocks(language):
    return code_blocks(README, language)


def test_there_is_no_block_that_this_file_does_not_know():
    assert set(re.findall(r"```(\w+)\n", README)) == {"bash", "python"}


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_targets_of_the_makefile(target):
    assert f"make {target}\n" in blocks("bash")
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert {"demo": "examples/demo.py", "test": "pytest"}[target] in done.stdout


def test_the_installation_is_what_the_makefile_does():
    (install,) = [b for b in blocks("bash") if b.startswith("pip install")]
    makefile = (ROOT / "Makefile").read_text()
    for line in install.strip().splitlines():
        assert line.removeprefix("pip install ") in makefile
        for name in re.findall(r"requirements/\S+", line):
            assert (ROOT / name).is_file()


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    return newcomer_with_files(README, tmp_path_factory.mktemp("newcomer"))


@pytest.mark.vllm
def test_every_command_does_what_the_readme_says(newcomer):
    """In the README's order, in a new directory. Only the port is another one where 8000 is taken."""
    make, test, train, serve, polyshard_serve, plain_vllm, request, install = blocks("bash")
    assert (make, test) == ("make demo\n", "make test\n")
    assert install.startswith("pip install")
    losses = re.findall(r"loss (\d\.\d+)", newcomer.types(train))
    assert len(losses) == 4
    assert float(losses[-1]) < 0.05 < float(losses[0])
    answer = "[24, 25, 26, 27, 28, 29, 30, 31]"
    assert f"after 20, 21, 22, 23: {answer}" in README
    assert newcomer.types(serve).splitlines()[-1] == f"after 20, 21, 22, 23: {answer}"
    with socket.socket() as probe:
        port = 8000 if probe.connect_ex(("127.0.0.1", 8000)) else free_port()
    # `polyshard serve` is run by the tutorial's test, with other names.
    tutorial = code_blocks((ROOT / "docs" / "tutorial.md").read_text(), "bash")
    assert polyshard_serve.replace("checkpoint", "by-twos").replace("my_model", "decoder") in tutorial
    command = plain_vllm if port == 8000 else f"{plain_vllm.rstrip()} --port {port}"
    with running_server(
        ["bash", "-ec", command], port, newcomer.folder / "server.log", newcomer.env, cwd=newcomer.folder
    ):
        told = json.loads(newcomer.types(request.replace("8000", str(port))))
    assert told["choices"][0]["token_ids"] == json.loads(answer)


def test_every_link_leads_to_a_file():
    for folder, text in [(ROOT, README), *((p.parent, p.read_text()) for p in (ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), f"{target} in {folder}"
