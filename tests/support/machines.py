"""Machines that are network namespaces of this one, joined by a switch. Needs root, `ip` and `tc`.

Each machine has an address and an interface `eth0`, and no route to anywhere else. The file system is shared, as
namespaces of the network are all that is made; a test that wants disks of their own gives each machine a folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PREFIX = "ps-machine"
INTERFACE = "eth0"
TESTS = Path(__file__).resolve().parents[1]


def unavailable() -> str | None:
    """Return why namespaces cannot be made here, or None."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)}, of the package iproute2"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    name = f"{PREFIX}-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"cannot make network namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Program:
    """A process on a machine, whose output is collected.

    Attributes:
        lines: the lines of stdout and stderr so far.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.lines: list[str] = []
        self._news, self._ended = threading.Condition(), False
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Return the first match in a line of the output, when there is one."""
        deadline, seen = time.monotonic() + seconds, 0
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    if match := re.search(pattern, line):
                        return match
                seen = len(self.lines)
                ended = self._ended
                if ended or time.monotonic() >= deadline:
                    raise AssertionError(f"no {pattern!r} in the output:\n{self.text}")
                self._news.wait(1.0)

    def end(self, seconds: float = 120) -> int:
        """Wait for the end, and return the exit code."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None
        self._reader.join()
        return code

    def kill(self) -> None:
        """Kill the process and its children."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


class Machines:
    """Machines 1 to `count`; a context manager that removes all of it, and ends what runs there."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._name = f"{PREFIX}-{os.getpid()}"
        self._programs: list[Program] = []

    def __enter__(self) -> Machines:
        _remove_abandoned()
        try:
            switch = f"{self._name}-switch"
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for number in range(1, self._count + 1):
                namespace = self._namespace(number)
                _ip("netns", "add", namespace)
                _ip("-n", namespace, "link", "set", "lo", "up")
                port = ("type", "veth", "peer", "name", f"port{number}", "netns", switch)
                _ip("-n", namespace, "link", "add", INTERFACE, *port)
                _ip("-n", namespace, "address", "add", f"{self.address(number)}/24", "dev", INTERFACE)
                _ip("-n", namespace, "link", "set", INTERFACE, "up")
                _ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._programs:
            program.kill()
        for name in _namespaces():
            if name.startswith(f"{self._name}-"):
                _ip("netns", "del", name)

    def address(self, number: int) -> str:
        return f"10.77.0.{number}"

    def start(self, number: int, *command: str | Path, **environment: str) -> Program:
        """Start a program of Python on a machine."""
        settings = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
            **environment,
        }
        inside = ("ip", "netns", "exec", self._namespace(number), sys.executable)
        program = Program([*inside, *map(str, command)], settings)
        self._programs.append(program)
        return program

    def cut(self, number: int) -> None:
        """Take the link of a machine down."""
        _ip("-n", self._namespace(number), "link", "set", INTERFACE, "down")

    def mend(self, number: int) -> None:
        """Bring it up again, at full speed."""
        self._tc("switch", "qdisc", "del", "dev", f"port{number}", "root")  # which there may not be
        _ip("-n", self._namespace(number), "link", "set", INTERFACE, "up")

    def impair(self, number: int) -> None:
        """Delay what a machine sends, and lose some of it: by netem, or without it by a short queue that overflows."""
        for how in (("netem", "delay", "2ms", "loss", "1%"), ("tbf", "rate", "40mbit", "burst", "4kb", "limit", "8kb")):
            if self._tc(number, "qdisc", "replace", "dev", INTERFACE, "root", *how).returncode == 0:
                return
        raise RuntimeError("the kernel has neither netem nor tbf")

    def slow(self, number: int, rate: str) -> None:
        """Limit what a machine receives, such as to `2mbit` a second, so that a test can act in the middle of it."""
        shaping = ("tbf", "rate", rate, "burst", "16kb", "latency", "500ms")
        self._tc("switch", "qdisc", "replace", "dev", f"port{number}", "root", *shaping).check_returncode()

    def received(self, number: int) -> int:
        """Return how many bytes a machine has received."""
        shown = _ip("-json", "-statistics", "-n", self._namespace(number), "link", "show", INTERFACE)
        return json.loads(shown)[0]["stats64"]["rx"]["bytes"]

    def lost_packets(self, number: int) -> int:
        """Return how many packets `impair` has lost."""
        shown = self._tc(number, "-s", "qdisc", "show", "dev", INTERFACE).stdout
        return sum(int(count) for count in re.findall(r"dropped (\d+)", shown))

    def _tc(self, place: int | str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["tc", "-n", self._namespace(place), *arguments], capture_output=True, text=True)

    def _namespace(self, place: int | str) -> str:
        return f"{self._name}-{place}"


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line]


def _remove_abandoned() -> None:
    """Remove the namespaces of test processes that were killed."""
    for name in _namespaces():
        match = re.match(rf"{PREFIX}-(\d+)-", name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _ip("netns", "del", name)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
