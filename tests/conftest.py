import gc
import os
import sys
from pathlib import Path

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

import multiprocessing  # noqa: E402
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
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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
