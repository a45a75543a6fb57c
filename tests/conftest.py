import gc
import getpass
import importlib.util
import json
import logging
import multiprocessing
import multiprocessing.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

# Temporary files of torchrun, vLLM and whatever else the tests start lie in one folder, which the session removes.
# pytest's own (tmp_path) and Inductor's cache stay where they would be.
SESSION_FOLDER = "POLYSHARD_TESTS_FOLDER"
OWNS_FOLDER = SESSION_FOLDER not in os.environ
multiprocessing.util.get_temp_dir()  # made here and not in that folder: it is removed after the session's end
if OWNS_FOLDER:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    os.environ[SESSION_FOLDER] = tempfile.mkdtemp(prefix="ps-tests-")
tempfile.tempdir = os.environ["TMPDIR"] = os.environ[SESSION_FOLDER]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "examples", ROOT / "tests"):
    sys.path.insert(0, str(folder))
# Fork servers and vLLM's workers find the examples and the tests' helpers too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "examples"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)

# Python would look at all objects that vLLM's imports make again and again, a fifth of the time that they take.
# Forked processes inherit it.
gc.set_threshold(100_000, 50, 100)

import torch  # noqa: E402

torch.set_num_threads(1)

from multiprocessing import forkserver  # noqa: E402

import pytest  # noqa: E402
from support import slow_time  # noqa: E402

from polyshard.launch import ranks  # noqa: E402

# The ranks of all tests are forked from one server; a library that it has imported costs them no seconds.
LIBRARIES = ("megatron.engine", "deepspeed.engine", "fairscale.engine", "vllm.exact")
imported = [*ranks.PRELOAD, "support.workers.engine_imports", *(f"polyshard.adapters.{name}" for name in LIBRARIES)]
imported.append("support.workers.frozen")
multiprocessing.set_forkserver_preload(imported)


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist's controller runs no test.
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        forkserver.ensure_running()
        from support import warm_spawn

        warm_spawn.install()


# Seconds of each test file in a whole run: a worker that came to a long one last would leave the other idle.
DURATIONS = Path(__file__).with_name("durations.json")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="Leave out vLLM engines and files that take long.")
    parser.addoption("--all-families", action="store_true", help="Not one in three of transformers' model families.")
    parser.addoption("--seconds", type=float, help="Begin no slow file that may end later; name those left out.")
    parser.addoption("--slow-from", type=int, default=0, help="With --seconds: which slow file comes first.")
    parser.addoption("--record-durations", action="store_true", help="Write tests/durations.json from this run.")


LONG = 10  # seconds of a file that --fast leaves out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seconds = json.loads(DURATIONS.read_text())

    def takes_long(item: pytest.Item) -> bool:
        return item.get_closest_marker("vllm") is not None or seconds.get(slow_time.file_of(item), 0) >= LONG

    if config.getoption("--fast"):
        config.hook.pytest_deselected(items=[item for item in items if takes_long(item)])
        items[:] = [item for item in items if not takes_long(item)]
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM"))
    items.sort(key=lambda item: -seconds.get(slow_time.file_of(item), 0))
    budget = config.getoption("--seconds")
    if budget is not None:
        slow = sorted({slow_time.file_of(item) for item in items if item.get_closest_marker("slow")})
        places = {name: place for place, name in enumerate(slow_time.turned(slow, config.getoption("--slow-from")))}
        items.sort(key=lambda item: places.get(slow_time.file_of(item), -1))  # after all others
        config.pluginmanager.register(slow_time.TimeForSlow(budget, seconds))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    skipped = [report for report in skipped if slow_time.REASON in str(report.longrepr)]
    for name in sorted({report.nodeid.partition("::")[0] for report in skipped}):
        terminalreporter.write_line(f"not run, {slow_time.REASON}: {name}", yellow=True)
    if not config.getoption("--record-durations"):
        return
    seconds: dict[str, float] = {}
    for report in (r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "duration")):
        name = report.nodeid.partition("::")[0].removeprefix("tests/")
        seconds[name] = seconds.get(name, 0) + report.duration
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    DURATIONS.write_text(json.dumps({name: round(value) for name, value in longest if value >= 1}, indent=1) + "\n")


def pytest_unconfigure() -> None:
    if OWNS_FOLDER:
        shutil.rmtree(os.environ[SESSION_FOLDER], ignore_errors=True)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    from smollm2 import smollm2_directory

    return smollm2_directory()


@pytest.fixture(scope="module", autouse=True)
def nothing_of_a_file_is_kept():
    """Undo the freezing of objects that test engines do (support/engines.py)."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def polyshards_warnings_still_reach_the_user():
    """No file, and no library that it imports, silences polyshard's loggers for the files after it."""
    yield
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "polyshard"]
    silenced = [name for name in ["polyshard", *names] if not _warns(logging.getLogger(name))]
    assert not silenced, f"silenced loggers: {silenced}"


def _warns(logger: logging.Logger) -> bool:
    enabled = logger.isEnabledFor(logging.WARNING) and not logger.disabled and not logger.filters
    return enabled and (logger.parent is None or (logger.propagate and _warns(logger.parent)))


@pytest.fixture
def compiles():
    """torch.compile works: tests of engines switch it off for their process when they are collected."""
    with torch._dynamo.config.patch(disable=False):
        yield


@pytest.fixture(autouse=True)
def no_registration_is_left_behind():
    """Each test's registrations end with it: child processes of the next one would look for them."""
    before = os.environ.get("POLYSHARD_MODELS")
    yield
    if before is None:
        os.environ.pop("POLYSHARD_MODELS", None)
    else:
        os.environ["POLYSHARD_MODELS"] = before
