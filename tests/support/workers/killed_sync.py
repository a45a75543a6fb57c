"""A trainer of one or two ranks and its vLLM engine; a process of one of them is killed or frozen during a sync.

RANK=.. WORLD_SIZE=.. killed_sync.py DIRECTORY OUT SCENARIO
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from polyshard.adapters.vllm.transfer import remote
from polyshard.adapters.vllm.transfer import sync as room
from support.engines import greedy
from support.workers.remote_sync import PROMPTS, own_engine, trainer

TIMEOUT = 8.0


def at_chunk(index, action):
    """Call `action(engine)` before chunk `index` is handed to the engine."""
    original = remote.RemoteEngine.load

    def load(self, version, number, chunk, bucket):
        if number == index:
            action(self)
        return original(self, version, number, chunk, bucket)

    remote.RemoteEngine.load = load

    def undo():
        remote.RemoteEngine.load = original

    return undo


def attempt(action):
    """What it raised, and how long it took."""
    started = time.monotonic()
    try:
        action()
    except Exception as error:
        return {"error": type(error).__name__, "told": str(error), "seconds": time.monotonic() - started}
    return {"error": None, "seconds": time.monotonic() - started}


def attempt_within(seconds, action):
    """`attempt` of something that may wait for ever: vLLM's engine process does not always end with its worker."""
    found = []
    thread = threading.Thread(target=lambda: found.append(attempt(action)), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else {"error": "no answer", "seconds": seconds}


def signal_worker(rank, number):
    def action(engine):
        (report,) = (r for r in engine._reports() if r["rank"] == rank)
        os.kill(report["pid"], number)

    return action


def frozen(engine, context, llm, result):
    sync = room.WeightSync(engine, context, llm, bucket_bytes=20_000, timeout=TIMEOUT)
    sync()
    undo = at_chunk(2, signal_worker(1, signal.SIGSTOP)) if llm else None
    result["worker frozen"] = attempt(sync)
    if llm:
        undo()
        for known in sync._remote[0]._reports():
            os.kill(known["pid"], signal.SIGCONT)
        time.sleep(1.0)
    result["after it woke"] = attempt(sync)
    if llm:
        result["generates again"] = attempt(lambda: greedy(llm, PROMPTS, 4))
    if context.rank == 1:
        put_pieces = room.put_pieces
        calls = []

        def stopping(*arguments):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            return put_pieces(*arguments)

        room.put_pieces = stopping
    result["trainer frozen"] = attempt(sync)
    result["then"] = attempt(lambda: greedy(llm, PROMPTS[:1], 4))


def killed(engine, context, llm, result):
    sync = room.WeightSync(engine, context, llm, bucket_bytes=20_000, timeout=60)
    undo = at_chunk(2, signal_worker(0, signal.SIGKILL)) if llm else None
    result["worker killed"] = attempt(sync)
    if llm:
        undo()
        result["then"] = attempt_within(30, lambda: greedy(llm, PROMPTS[:1], 4))
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    result["trainer killed"] = attempt(sync)


SCENARIOS = {"frozen": (frozen, 2), "killed": (killed, 1)}


def main():
    directory, out, scenario = sys.argv[1:]
    act, engine_tensor = SCENARIOS[scenario]
    started = Path(out, f"{scenario}-engine-started")
    llm = None
    if os.environ["RANK"] == "0":
        llm = own_engine(directory, engine_tensor, "float32")
        started.touch()
    while not started.exists():  # before the short timeout begins
        time.sleep(0.2)
    context, engine, _ = trainer(directory, "torch", 1, {}, timeout=15)
    result = {}
    act(engine, context, llm, result)
    Path(out, f"{scenario}-{context.rank}.json").write_text(json.dumps(result))
    os._exit(0)  # the engine may be beyond an orderly end


if __name__ == "__main__":
    main()
