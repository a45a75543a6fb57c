"""Somebody dies or freezes during a sync: an error in bounded time that names who, and no half-updated model in use."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import support.vllm_required  # noqa: F401
from support import forked
from support.models.tiny import save_tiny
from support.paths import WORKERS
from support.warm_spawn import OWN_SERVER
from support.workers.killed_sync import TIMEOUT

from polyshard.launch.ranks import free_port

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

SCRIPT = WORKERS / "killed_sync.py"


def run(scenario, ranks, folder):
    directory = save_tiny(folder / "old", "qwen3", head_dim=32)
    port = str(free_port())
    started = []
    for rank in range(ranks):
        environment = {**os.environ, OWN_SERVER: "1"}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = folder / f"{rank}.log"
        started.append(forked.start(SCRIPT, [str(directory), str(folder), scenario], environment, log, log))
    try:
        started[0].join(240)
    finally:
        for process in started:
            try:
                os.killpg(process.pid, 9)
            except ProcessLookupError:
                continue
    result = folder / f"{scenario}-0.json"
    assert result.is_file(), (folder / "0.log").read_text()[-3000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Both scenarios at the same time: they mostly wait for timeouts."""
    names = ("frozen", "killed")
    with ThreadPoolExecutor(len(names)) as pool:
        found = pool.map(lambda name: run(name, 2, tmp_path_factory.mktemp(name)), names)
        return dict(zip(names, found))


def test_a_frozen_worker_and_a_frozen_trainer(outcomes):
    result = outcomes["frozen"]
    worker = result["worker frozen"]
    assert worker["error"] == "WeightSyncError"
    assert "worker 1 (process" in worker["told"]
    assert "is stopped" in worker["told"]
    assert worker["seconds"] < 2 * TIMEOUT + 5
    assert result["after it woke"]["error"] is None, "the next sync mends the engine"
    assert result["generates again"]["error"] is None
    trainer = result["trainer frozen"]
    assert trainer["error"] == "RankFailureError"
    assert "rank 1 crashed, hung, or cannot be reached" in trainer["told"]
    assert trainer["seconds"] < 20
    assert result["then"]["error"] is not None, "a half-updated model generated"


def test_a_killed_worker_and_a_killed_trainer(outcomes):
    result = outcomes["killed"]
    worker = result["worker killed"]
    assert worker["error"] == "WeightSyncError"
    assert "worker 0 (process" in worker["told"]
    assert "is dead" in worker["told"]
    assert worker["seconds"] < 30
    assert result["then"]["error"] is not None
    trainer = result["trainer killed"]
    assert trainer["error"] == "RankFailureError"
    assert "rank 1 crashed, hung, or cannot be reached" in trainer["told"]
    assert trainer["seconds"] < 20
