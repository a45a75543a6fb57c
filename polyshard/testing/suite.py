"""The conformance suite: requirements for every adapter, as tests that depend on capabilities and never on names.

The author of an adapter writes:

    from polyshard.testing import AdapterSuite

    class TestMyAdapter(AdapterSuite):
        adapter = "my_adapter"                                # as in the entry-point group polyshard.adapters
        engines = ({"zero_stage": 1}, {"zero_stage": 2})      # options of its engine, each tested

and runs pytest. The reference is the same model in float64 in one process (`polyshard.testing.reference`). Bounds are
measured: the reference in float32 shows how far rounding alone moves each quantity, and the adapter may deviate four
times as far, because it sums in a different order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch.nn import functional as F

from polyshard.core.capabilities import FEATURES, Capabilities
from polyshard.core.discovery import load_adapter
from polyshard.launch.ranks import run_ranks
from polyshard.testing import checks, resuming
from polyshard.testing.model import SuiteConfig
from polyshard.testing.reference import reference_run, reference_training, reference_updates

MARGIN = 4.0
FLOOR = 1e-6  # relative; about eight roundings of float32
STEPS = 12
SETTINGS = {"lr": 3e-3, "weight_decay": 0.05, "max_grad_norm": 0.5}
SIZES = (1, 2, 4)
WORLDS = {  # ranks, tensor size, context size
    "1": (1, 1, 1),
    "tensor 2": (2, 2, 1),
    "data 2": (2, 1, 1),
    "context 2": (2, 1, 2),
    "tensor 2, data 2": (4, 2, 1),
    "data 2, context 2": (4, 1, 2),
}

SMALL_WORLDS = ("tensor 2", "data 2", "context 2")  # each is a part of a larger one: for an adapter's first engine only

Gpus = bool | Literal["shared"]


@cache
def _layers(adapter: str, gpus: Gpus, tensor: int, sequence_parallel: bool, context: int = 1) -> list[Any]:
    return run_ranks(checks.layers, tensor * context, adapter, tensor, sequence_parallel, context, gpus=gpus)


@cache
def _pieces(adapter: str, gpus: Gpus) -> list[Any]:
    return run_ranks(checks.pieces, 2, adapter, gpus=gpus)


@cache
def _oracle(tied: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    config = SuiteConfig(tied=tied)
    return reference_run(config, *checks.tokens(config), dtype=dtype)


@cache
def _oracle_training() -> tuple[list[float], list[float]]:
    config = SuiteConfig()
    return reference_training(config, checks.batches(config, STEPS), **SETTINGS)


@cache
def _oracle_updates() -> tuple[list[float], dict[str, torch.Tensor]]:
    return reference_updates(SuiteConfig(), checks.uneven_batches(SuiteConfig()), lr=1.0, eps=1.0)


class AdapterSuite:
    """Base class of an adapter's tests; a subclass names the adapter.

    Attributes:
        adapter: the adapter's name.
        engines: options of its training engine, each tested.
        gpus: whether ranks compute on GPUs. True: each rank has its own GPU, and tests that need more GPUs than this
            machine has are skipped. `"shared"`: ranks share the GPUs and communicate through gloo.
        max_ranks: tests that need more ranks are skipped; None runs all.

    Examples:
        >>> class TestMyAdapter(AdapterSuite):
        ...     adapter = "torch"
        >>> TestMyAdapter().need("training")["training"].available
        True
    """

    adapter: ClassVar[str]
    engines: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    gpus: ClassVar[Gpus] = False
    max_ranks: ClassVar[int | None] = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize the training tests with the subclass's engines."""
        if "engine" in metafunc.fixturenames:
            metafunc.parametrize("engine", [pytest.param(dict(e), id=_label(e)) for e in self.engines])

    def need(self, *features: str, ranks: int = 1) -> Capabilities:
        """Skip the test, with a reason, if the adapter lacks a feature or there are too few GPUs or ranks."""
        if self.max_ranks is not None and ranks > self.max_ranks:
            pytest.skip(f"needs {ranks} ranks; this suite runs at most {self.max_ranks}")
        if self.gpus is True and torch.cuda.device_count() < ranks:
            pytest.skip(f"needs {ranks} GPUs, one for each rank; this machine has {torch.cuda.device_count()}")
        capabilities = load_adapter(self.adapter).capabilities
        for feature in ("cuda" if self.gpus else "cpu", *features):
            answer = capabilities[feature]
            if not answer.available:
                pytest.skip(f"{FEATURES[feature]}: {answer.reason} ({answer.whose})")
        return capabilities

    def test_every_capability_is_answered(self) -> None:
        """Every feature has an answer."""
        capabilities = load_adapter(self.adapter).capabilities
        assert {name for name, _ in capabilities} == set(FEATURES)

    @pytest.mark.parametrize("tied", ["untied", "tied"])
    @pytest.mark.parametrize("tensor", SIZES)
    def test_logits_loss_and_gradients(self, tensor: int, tied: str) -> None:
        """Biases, fused segments, shared KV heads, a padded vocabulary, tied embeddings, ignored targets."""
        self.need("training", "tensor", ranks=tensor)
        self._judge(_layers(self.adapter, self.gpus, tensor, False), tied)

    @pytest.mark.parametrize("tied", ["untied", "tied"])
    @pytest.mark.parametrize("tensor", [2, 4])
    def test_sequence_parallel(self, tensor: int, tied: str) -> None:
        """The same, with activations sharded along the sequence."""
        self.need("training", "sequence", ranks=tensor)
        self._judge(_layers(self.adapter, self.gpus, tensor, True), tied)

    @pytest.mark.parametrize("tied", ["untied", "tied"])
    @pytest.mark.parametrize("tensor", [1, 2])
    def test_context_parallel(self, tensor: int, tied: str) -> None:
        """Sequences are sharded over two ranks with different numbers of targets; the loss is the same on both."""
        self.need("training", "tensor", "context", ranks=2 * tensor)
        self._judge(_layers(self.adapter, self.gpus, tensor, False, 2), tied)

    @pytest.mark.parametrize("tensor", SIZES)
    def test_autocast(self, tensor: int) -> None:
        """In bfloat16 the loss is within one percent."""
        self.need("training", "tensor", ranks=tensor)
        exact = _oracle(False, torch.float64)["loss"]
        for result in _layers(self.adapter, self.gpus, tensor, False):
            assert abs(result["untied"]["autocast"].double() - exact) < 0.01 * exact

    def test_initial_weights_are_the_same_at_every_size(self) -> None:
        """Initial weights are equal bit for bit."""
        self.need("training", "tensor", ranks=max(SIZES))
        first, *others = [_layers(self.adapter, self.gpus, tensor, False)[0]["initial"] for tensor in SIZES]
        for other in others:
            assert set(other) == set(first)
            assert all(torch.equal(other[name], first[name]) for name in first)

    @pytest.mark.parametrize("world", WORLDS)
    def test_training(self, world: str, engine: dict[str, Any]) -> None:
        """Compare twelve steps with clipping, half of them with micro-batches, to a single process."""
        self._first_engine_only(engine, world, SMALL_WORLDS)
        ranks, tensor, context = WORLDS[world]
        self.need("training", "tensor", "data", *(["context"] if context > 1 else []), ranks=ranks)
        losses, norms = (torch.tensor(x) for x in _oracle_training())
        assert losses[-1] < 0.8 * losses[0], "the oracle does not learn"
        arguments = (self.adapter, tensor, context, engine, STEPS, SETTINGS)
        results = run_ranks(checks.training, ranks, *arguments, gpus=self.gpus)
        for result in results:
            got = torch.tensor(result["losses"], dtype=losses.dtype)
            # AdamW amplifies rounding if the second moment is tiny, so later steps get a wider bound.
            assert torch.allclose(got[:5], losses[:5], rtol=1e-5, atol=0)
            assert torch.allclose(got, losses, rtol=1e-3, atol=0)
            assert torch.allclose(torch.tensor(result["norms"]), norms, rtol=5e-3)
            assert torch.allclose(torch.tensor(result["norms"][:5]), norms[:5], rtol=1e-4)
            for name, weight in results[0]["weights"].items():
                assert torch.equal(result["weights"][name], weight), f"{name} differs between ranks"

    @pytest.mark.parametrize("world", ["1", "data 2, context 2"])
    def test_unequal_numbers_of_labels(self, world: str, engine: dict[str, Any]) -> None:
        """`train_batch` computes the gradient of a single process with the full batch, wherever its labels are."""
        ranks, tensor, context = WORLDS[world]
        self.need("training", "data", *(["context"] if context > 1 else []), ranks=ranks)
        losses, weights = _oracle_updates()
        results = run_ranks(checks.uneven, ranks, self.adapter, tensor, context, engine, gpus=self.gpus)
        for result in results:
            assert result["tokens"] == [sum(kept) for kept in checks.UNEVEN]
            assert torch.allclose(torch.tensor(result["losses"]), torch.tensor(losses), rtol=1e-5)
            for name, weight in result["weights"].items():
                assert float((weight.double() - weights[name]).abs().max()) < 1e-5, name

    @pytest.mark.parametrize("world", ["data 2", "context 2"])
    def test_a_run_goes_on_bit_for_bit_from_its_saved_state(
        self, world: str, engine: dict[str, Any], tmp_path: Path
    ) -> None:
        """At the same sizes, weights, optimizer, random states (dropout) and data positions are restored."""
        self._first_engine_only(engine, world, ("context 2",))
        ranks, tensor, context = WORLDS[world]
        self.need("training", "data", *(["context"] if context > 1 else []), ranks=ranks)
        half, steps = STEPS // 2, STEPS
        arguments = (self.adapter, tensor, engine, half, steps, tmp_path / "state", 0.1, context)
        results = run_ranks(resuming.all_in_one, ranks, *arguments, gpus=self.gpus)
        for rank, (uninterrupted, begun, (losses, weights, step, data, carried)) in enumerate(results):
            assert begun + losses == uninterrupted[0]
            assert all(torch.equal(weights[name], value) for name, value in uninterrupted[1].items())
            assert (step, data) == (half, {"row": half, "rank": rank // context})
            assert carried == ["optimizer", "random", "weights"]

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_cross_entropy(self, reduction: str, smoothing: float) -> None:
        """The loss over a sharded, padded vocabulary equals torch's; logits are not modified; no labels give 0."""
        self.need("training", "tensor", ranks=2)
        for rank, result in enumerate(_pieces(self.adapter, self.gpus)):
            found = result["loss"]
            loss, gradient, untouched = found[f"{reduction} {smoothing}"]
            logits = found["logits"].double().requires_grad_()
            want = F.cross_entropy(logits, found["targets"], reduction=reduction, label_smoothing=smoothing)
            want.sum().backward()
            assert logits.grad is not None
            assert torch.allclose(loss.double(), want.detach(), rtol=1e-5, atol=1e-6)
            full = torch.cat((logits.grad, torch.zeros(len(logits.grad), 1)), dim=1)
            assert torch.allclose(gradient.double(), full.chunk(2, dim=1)[rank], rtol=1e-4, atol=1e-7)
            assert untouched
            for name, (loss, gradient) in found["no labels"].items():
                assert not loss.any(), f"{name} of no label is {loss}"
                assert not gradient.any(), f"{name} of no label has the gradient {gradient}"

    def test_dropout(self) -> None:
        """The same seed gives the same loss at tensor-parallel 1 and 2; the next draw gives a different one."""
        self.need("training", "tensor", ranks=2)
        results = _pieces(self.adapter, self.gpus)
        for result in results:
            first, second, third = result["dropout"]
            assert first == second != third
            assert torch.allclose(result["dropout"], results[0]["dropout alone"], rtol=1e-5)
        replicas = [result["dropout of a replica"] for result in results]
        assert replicas[0] != replicas[1], "data-parallel ranks with different seeds draw the same numbers"

    def test_groups_that_another_library_made(self) -> None:
        """The loss is the same on the process groups of another library."""
        self.need("training", "tensor", ranks=2)
        exact = _oracle(False, torch.float64)["loss"].float()
        assert all(torch.allclose(result["adopted"], exact, rtol=1e-5) for result in _pieces(self.adapter, self.gpus))

    def test_initialise_again_with_another_size(self) -> None:
        """The loss is the same after shutting down and initializing again in the same processes."""
        self.need("training", "tensor", ranks=2)
        exact = _oracle(False, torch.float64)["loss"].float()
        assert all(torch.allclose(result["again"], exact, rtol=1e-5) for result in _pieces(self.adapter, self.gpus))

    def test_wrong_sizes_are_refused_by_name(self) -> None:
        """The error is raised before the library sees the sizes."""
        self.need("training", "tensor", ranks=2)
        for result in _pieces(self.adapter, self.gpus):
            column, row, qkv = result["refused"]
            assert "column_parallel: 7 cannot be divided by tensor-parallel size 2" in column
            assert "row_parallel: 9 cannot be divided" in row
            assert "q_proj: 3 blocks of 4 cannot be divided" in qkv

    def test_ids_and_labels_outside_the_vocabulary_are_refused_by_name(self) -> None:
        """On the CPU, with and without `vocab_size`, including those of the padding; a GPU asserts asynchronously."""
        self.need("training", "tensor", ranks=2)
        if self.gpus:
            pytest.skip("on a GPU the assertion ends the process")
        for result in _pieces(self.adapter, self.gpus):
            assert len(result["ids"]) == 15
            for what, message in result["ids"].items():
                wrong = what.split()[-1]
                assert f"token ID {wrong} is outside" in message or f"label {wrong} " in message, f"{what}: {message}"

    def test_a_dead_rank_is_named_in_time(self) -> None:
        """A crashed rank is identified within the timeout."""
        self.need("training", "tensor", ranks=2)
        timeout = 20.0
        result = run_ranks(checks.dies, 2, self.adapter, timeout, silent=(1,), gpus=self.gpus)[0]
        assert result is not None, "no RankFailureError was raised"
        seconds, message, ranks = result
        assert seconds < timeout
        assert ranks == (1,)
        assert "rank 1 crashed, hung, or cannot be reached" in message

    def _first_engine_only(self, engine: dict[str, Any], world: str, worlds: Sequence[str]) -> None:
        if world in worlds and engine != dict(self.engines[0]):
            pytest.skip(f"{world} is run for the first engine; this one has the larger layouts")

    def _judge(self, results: list[Any], tied: str) -> None:
        exact, rounded = (_oracle(tied == "tied", dtype) for dtype in (torch.float64, torch.float32))
        found = results[0][tied]
        assert set(found) - {"autocast"} == set(exact)
        worst = max(_error(rounded[name], exact[name]) for name in exact)
        for name in exact:
            error = _error(found[name], exact[name])
            assert error < MARGIN * worst + FLOOR, f"{name}: {error:.1e}; rounding alone: {worst:.1e}"
        for other in results[1:]:
            assert torch.equal(other[tied]["loss"], found["loss"]), "ranks disagree on the loss"


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).abs().max() / exact.abs().max())


def _label(engine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in engine.items()) or "default"
