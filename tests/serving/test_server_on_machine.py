"""torchrun on two machines and vLLM's server on a third, whose links are cut in the middle of a weight sync.

The machines are network namespaces, joined by a switch.
"""

import json
import os
import re
import time
from dataclasses import dataclass

import pytest
import support.engines  # environment variables, before vLLM is imported
import support.vllm_required  # noqa: F401
import torch
import transformers
from support.machines import Machines, Program, unavailable
from support.models.tiny import save_tiny
from support.paths import EXAMPLES
from support.servers import ENGINE_WITHOUT_WORKER_PROCESS
from support.workers import rl_on_machines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]

TIMEOUT = 12  # of the trainer's collectives; that of a sync is half of it
STEPS = 3
SLOW = 300  # seconds until a program has started on a busy machine
SERVER, PORT = 3, 8000  # number of the machine
SERVER_CUT, TRAINER_CUT = 2, 3  # the syncs in which a link is cut
LIBRARY = {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES), str(EXAMPLES.parent / "tests")])}
REQUEST = """
import json, sys, urllib.request
body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4, "temperature": 0.0}}
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), {"Content-Type": "application/json"})
try:
    print("answered:", urllib.request.urlopen(request, timeout=1).read())
except OSError as error:
    print("no answer:", error)
"""


def serve(machines, directory):
    options = {"dtype": "float32", "max-model-len": 128, "kv-cache-memory-bytes": 32 << 20}
    command = ["-c", "from polyshard.cli import main; main()", "serve", directory, "--factory", "decoder:build_model"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += [f"--port={PORT}", "--host=0.0.0.0", "--enforce-eager", "--enable-scale-out"]
    command += ["--weight-transfer-config", json.dumps({"backend": "polyshard"})]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO", **ENGINE_WITHOUT_WORKER_PROCESS}
    return machines.start(SERVER, *command, **settings, **LIBRARY)


@dataclass(frozen=True)
class Run:
    """What was printed: by both trainers until a link of theirs was cut, and by the one that continued after it."""

    before: list[Program]
    after: Program
    request: str  # the server's answer to a request from its own machine, after the failed sync
    seconds: list[float]  # from each cut until the trainers had told of it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The server's link is cut in a sync, and comes back. In the next sync a trainer's machine is lost for good."""
    folder = tmp_path_factory.mktemp("machines")
    directory, pauses = save_tiny(folder / "model", "qwen3", head_dim=32), folder / "pauses"
    pauses.mkdir()
    for step in (1, SERVER_CUT, TRAINER_CUT):
        (pauses / f"sync-{step}").touch()
    with Machines(3) as machines:
        url = f"http://{machines.address(SERVER)}:{PORT}"
        script = (rl_on_machines.__file__, directory, url, folder / "out")
        script += ("--steps", STEPS, "--timeout", TIMEOUT, "--pauses", pauses)
        meeting = ("--nnodes", 2, "--master-addr", machines.address(1), "--master-port", 29500)

        def start(number):
            command = ("-m", "torch.distributed.run", *meeting, "--node-rank", number - 1, *script)
            return machines.start(number, *map(str, command), **LIBRARY)

        def cut_in_sync(step, number):
            """Cut a machine's link when the server has received a part of the weights; return the time."""
            for program in trainers:
                program.wait_for(f"paused sync-{step}", SLOW)
            machines.slow(SERVER, "400kbit")
            received = machines.received(SERVER)
            (pauses / f"sync-{step}").unlink()
            deadline = time.monotonic() + 60
            while machines.received(SERVER) < received + 150_000:  # from both trainers, which have 440 kB
                assert time.monotonic() < deadline, trainers[0].text
                time.sleep(0.01)
            machines.cut(number)
            return time.monotonic()

        server, trainers = serve(machines, directory), [start(1), start(2)]
        server.wait_for("Application startup complete", SLOW)
        (pauses / "sync-1").unlink()
        cut = cut_in_sync(SERVER_CUT, SERVER)
        trainers[0].wait_for("the engine far gets no weights")
        seconds = [time.monotonic() - cut]
        request = machines.start(SERVER, "-c", REQUEST, f"{url}/inference/v1/generate")
        request.end()
        machines.mend(SERVER)
        cut = cut_in_sync(TRAINER_CUT, 2)
        for program in trainers:
            program.wait_for("failed .*Error")
        seconds.append(time.monotonic() - cut)
        for program in trainers:
            program.kill()
        machines.mend(SERVER)
        after = machines.start(1, *map(str, script), **LIBRARY)
        assert after.end(SLOW) == 0, after.text
        yield Run(trainers, after, request.text, seconds)


def steps_of(program):
    return [json.loads(line) for line in program.lines if line.startswith('{"step"')]


def test_every_answer_is_that_of_transformers_with_the_trainers_weights(run):
    """One process continues the run of two, so its shards are other ones."""
    steps = steps_of(run.before[0]) + steps_of(run.after)
    assert [step["step"] for step in steps] == [1, SERVER_CUT, TRAINER_CUT]
    for step in steps:
        model = transformers.AutoModelForCausalLM.from_pretrained(step["weights"])
        for prompt, (tokens, logprobs, versions) in zip(rl_on_machines.PROMPTS, step["answers"], strict=True):
            assert versions == [f"{step['step']}"] * 8
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == tokens
            expected = logits.log_softmax(-1)[range(8), tokens]
            torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=2e-5)


def test_a_server_that_cannot_be_reached_is_named_in_time_and_gets_the_weights_when_it_can(run):
    told = run.before[0].wait_for("the engine far gets no weights until it can be reached again: (.*)")[1]
    assert told.startswith("sync failed: far: ")
    assert re.search("(worker 0|update_weights within 6 s: the engine) died, froze, or cannot be reached", told)
    assert run.seconds[0] < 3 * TIMEOUT


def test_a_server_with_a_part_of_the_weights_gives_no_answer(run):
    assert run.request == "no answer: timed out"


def test_a_trainer_machine_that_is_lost_in_a_sync_is_named_on_every_rank(run):
    messages = [program.wait_for("^failed RankFailureError: (.*)")[1] for program in run.before]
    assert "rank 1 crashed, hung, or cannot be reached" in messages[0]
    assert "the process that keeps the store" in messages[1]
    assert run.seconds[1] < 3 * TIMEOUT
