"""torchrun on two machines and an object store on a third; the machines are network namespaces, joined by a switch.

They share no disk: each saves its part of the states to the store.
"""

import json
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import pytest
from support.machines import Machines, Program, unavailable
from support.object_store import client_settings
from support.workers import on_machines

pytest.importorskip("moto")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))]

TIMEOUT = 10
STEPS = 6
STORE = 3  # the number of the machine
CUT_STEP, BACK_AT, CUT_SAVE = 3, 4, 5


def lines_of(program):
    return [json.loads(line[line.index("{") :]) for line in program.lines if '"ranks":' in line]


def steps_of(program):
    return [line for line in lines_of(program) if "step" in line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The steps of a run of one process, by number."""
    with redirect_stdout(StringIO()) as out:
        on_machines.train(str(tmp_path_factory.mktemp("alone")), STEPS, TIMEOUT)
    lines = [json.loads(line) for line in out.getvalue().splitlines() if '"step"' in line]
    return {line["step"]: line for line in lines}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on both machines. Machine 2 is lost in a step, comes back, and is lost again while a state is saved."""
    pauses = tmp_path_factory.mktemp("pauses")
    for place in (f"step-{CUT_STEP}", f"step-{BACK_AT}", f"save-{CUT_SAVE}"):
        (pauses / place).touch()
    with Machines(3) as machines:
        machines.impair(1)
        machines.impair(2)
        server = machines.start(STORE, "-m", "support.object_store", machines.address(STORE))
        store = client_settings(machines.address(STORE), int(server.wait_for(r"^(\d+)$")[1]))

        def start(number):
            elastic = ("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.1")
            meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machines.address(1)}:29400", "--rdzv-id", "run")
            # Without `is_host`, the agent resolves its own host's name, which knows nothing of namespaces.
            tuning = f"is_host={int(number == 1)},last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
            here = ("--rdzv-conf", tuning, "--local-addr", machines.address(number))
            script = (on_machines.__file__, "s3://bucket/run", "--steps", str(STEPS), "--timeout", str(TIMEOUT))
            command = ("-m", "torch.distributed.run", *elastic, *meeting, *here, *script, "--pauses", str(pauses))
            disk = tmp_path_factory.mktemp(f"disk-{number}")
            # Otherwise an agent that joins late waits in vain for an address: the first one keeps it to itself
            # (torch 2.13, DynamicRendezvousHandler.next_rendezvous).
            own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            return machines.start(number, *command, TMPDIR=str(disk), **store, **own_store)

        first, lost = start(1), start(2)
        for program in (first, lost):
            program.wait_for(f"paused step-{CUT_STEP}")
        machines.cut(2)
        (pauses / f"step-{CUT_STEP}").unlink()
        lost.wait_for("failed after")
        lost.kill()
        first.wait_for(f"paused step-{BACK_AT}")  # it continues alone
        machines.mend(2)
        again = start(2)
        again.wait_for(f"paused step-{BACK_AT}")
        (pauses / f"step-{BACK_AT}").unlink()
        first.wait_for(f"paused save-{CUT_SAVE}")
        machines.cut(2)
        (pauses / f"save-{CUT_SAVE}").unlink()
        again.wait_for("failed after")
        again.kill()
        assert first.end() == 0, first.text
        yield Run(first, lost, again, machines.lost_packets(1) + machines.lost_packets(2))


@dataclass(frozen=True)
class Run:
    """What the machines have printed: machine 1, and machine 2 before it was lost and after."""

    first: Program
    lost: Program
    again: Program
    lost_packets: int


def test_a_lost_machine_leaves_a_smaller_run_and_may_come_back(run):
    begun = [(line["begins"], line["ranks"]) for line in lines_of(run.first) if "begins" in line]
    assert begun == [(0, 2), (CUT_STEP - 1, 1), (BACK_AT - 1, 2), (CUT_SAVE - 1, 1)]
    assert run.lost_packets > 0, "the network was as bad as it should be"


def test_every_step_has_the_rows_and_the_loss_of_an_undisturbed_run(run, undisturbed):
    steps = steps_of(run.first)
    assert {line["step"] for line in steps} == set(range(1, STEPS + 1))
    assert {line["ranks"] for line in steps} == {1, 2}
    for line in steps:
        expected = undisturbed[line["step"]]
        assert line["rows"] == expected["rows"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_both_sides_of_a_cut_link_are_told_in_time(run):
    failures = [line for line in run.first.lines if line.startswith("failed RankFailureError")]
    assert len(failures) == 2
    where = ("data all_reduce", "world checkpoint exchange")
    for message, collective in zip(failures, where):
        assert f"rank 0: {collective} failed after" in message
        assert "rank 1 crashed, hung, or cannot be reached" in message
    for program, collective in zip((run.lost, run.again), where):
        message = program.wait_for("failed RankFailureError: .*").group()
        assert f"rank 1: {collective} failed after" in message
        assert "the process that keeps the store" in message
        assert "cannot be reached" in message
        failures.append(message)
    assert all(float(re.search(r"failed after ([\d.]+) s", message)[1]) < TIMEOUT for message in failures)


def test_the_store_has_every_state_and_nothing_of_the_save_that_was_cut(run):
    found = json.loads(run.first.wait_for(r"^states (\[.*)")[1])
    assert found == [f"step-{step:04d}" for step in range(1, STEPS + 1)]
