import gc
import getpass
import importlib.util
import logging
import multiprocessing
import multiprocessing.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

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

import torch  # noqa: E402

torch.set_num_threads(1)

from multiprocessing import forkserver  # noqa: E402

import pytest  # noqa: E402

from polyshard.testing import ranks  # noqa: E402

# The ranks of all tests are forked from one server; a library that it has imported costs them no seconds.
LIBRARIES = ("megatron.engine", "deepspeed.engine", "fairscale.engine", "vllm.exact")
imported = [*ranks.PRELOAD, *(f"polyshard.adapters.{name}" for name in LIBRARIES), "support.engine_imports"]
multiprocessing.set_forkserver_preload(imported)
forkserver.ensure_running()


# The files that take minutes, longest first: a worker that came to one of them last would leave the other idle.
LONG = (
    *(
        "conformance",
        "transformers_families",
        "rl",
        "vllm_serving",
        "weight_sync_kills",
        "server",
        "examples",
        "vllm_failures",
    ),
    *("torch_adapter", "exact", "weight_sync_ranks", "readme", "transformers_models", "checkpoint_kills"),
    *("vllm_compiled", "generic_models", "verify", "rank_failures", "attention_kernels", "vllm_features"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": index for index, name in enumerate(LONG)}
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM"))
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_unconfigure() -> None:
    if OWNS_FOLDER:
        shutil.rmtree(os.environ[SESSION_FOLDER], ignore_errors=True)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    from smollm2 import smollm2_directory

    return smollm2_directory()


@pytest.fixture(scope="module", autouse=True)
def nothing_of_a_file_is_kept():
    """Engines of tests keep what came before them from the garbage collector."""
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
