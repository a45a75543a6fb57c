"""Verification of a conversion (`--verify`): source and target are compared through independent readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyshard.config.decoder_spec import FAMILIES
from polyshard.convert.accounting import PREFIXES, REDUNDANT, some
from polyshard.convert.format import (
    CheckpointFormat,
    Foreign,
    Independent,
    NotComparableError,
    Options,
    config_fields_of,
)
from polyshard.core.errors import CheckpointError
from polyshard.weights.fingerprint import fingerprint
from polyshard.weights.lazy_tensor import LazyTensor

TOKENS = 320  # longer than the first periods of a rotary scaling or a window in a tiny model
FLOAT64_LIMIT = 400_000_000  # elements; larger models are compared in float32
CLOSE = {torch.float64: 2e-5, torch.float32: 2e-3}  # relative to the largest logit; transformers' norms are float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The result of a verification.

    Attributes:
        tensors: number of tensors that are equal bit for bit.
        logits: the largest difference of logits; None if they were not compared.
        compared: descriptions of what was compared.
        not_compared: descriptions of what was not compared, with reasons.
    """

    tensors: int
    logits: float | None
    compared: tuple[str, ...]
    not_compared: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One end of a conversion."""

    format: CheckpointFormat
    path: Path
    options: Options


def prove(expected: Foreign, source: Side, target: Side, *, rounded: torch.dtype | None) -> Proof:
    """Compare the written tensors with the intended ones, and the logits of the target with those of the source.

    Args:
        expected: the tensors that should have been written.
        source: the source of the conversion.
        target: the target of the conversion.
        rounded: dtype that the conversion cast to.

    Raises:
        CheckpointError: they differ.
    """
    again = target.format.read(target.path, target.options)
    tensors = compare(expected, again)
    compared = [f"{tensors} tensors read back, bit for bit"]
    if expected.config is None or not isinstance(expected.config.get("vocab_size"), int):
        why = ("logits: the configuration does not define vocab_size",)
        return Proof(tensors=tensors, logits=None, compared=tuple(compared), not_compared=why)
    ids = _ids(expected.config)
    float64 = sum(torch.Size(t.shape).numel() for t in expected.tensors.values()) <= FLOAT64_LIMIT
    skipped: list[str] = []
    for dtype in (torch.float64, torch.float32)[0 if float64 else 1 :]:  # some models only support float32
        skipped = []
        try:
            first = _reading("the source", source, expected, ids, dtype, rounded)
        except NotComparableError as reason:
            skipped, first = [f"the source's logits by another reader than polyshard's: {reason}"], None
            if expected.config.get("model_type") not in FAMILIES:  # transformers may use other names for its tensors
                continue
        try:
            ours = Independent(by="polyshard's own reader", state=_Loading(expected.tensors))
            first = first or logits_of(ours, expected.config, ids, dtype, None, "the source")
            second = _reading("the target", target, expected, ids, dtype, rounded)
        except NotComparableError as reason:
            skipped.append(f"logits: {reason}")
            continue
        difference = _difference(first, second, CLOSE[dtype])
        compared.append(f"logits of {ids.shape[1]} tokens: the source by {first.by}, the target by {second.by}")
        if first.unread:
            skipped.append(f"tensors that {first.by} does not load: {some(first.unread)}")
        return Proof(tensors=tensors, logits=difference, compared=tuple(compared), not_compared=tuple(skipped))
    return Proof(tensors=tensors, logits=None, compared=tuple(compared), not_compared=tuple(skipped))


class _Loading(Mapping[str, torch.Tensor]):
    """A mapping that loads lazy tensors on access."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, slots=True)
class Reading:
    """Logits `[tokens, vocabulary]`, the reader, and the tensors that this reader ignores."""

    logits: torch.Tensor
    by: str
    unread: tuple[str, ...] = ()


def _reading(
    what: str, side: Side, expected: Foreign, ids: torch.Tensor, dtype: torch.dtype, rounded: torch.dtype | None
) -> Reading:
    assert expected.config is not None
    return logits_of(side.format.independent(side.path, side.options), expected.config, ids, dtype, rounded, what)


def _difference(first: Reading, second: Reading, close: float) -> float:
    ours, theirs = first.logits.double(), second.logits.double()
    if not ours.isfinite().all():
        raise CheckpointError(
            f"verification failed: the source's logits by {first.by}, with weights in the dtype written, are not "
            "finite, so nothing can be compared. Look for NaN and infinity in the weights, or omit --verify."
        )
    difference, limit = float((ours - theirs).abs().max()), close * float(ours.abs().max())
    if not difference <= limit:  # also fails for NaN
        raise CheckpointError(
            f"verification failed: logits differ by up to {difference:.2e}, expected at most {limit:.2e}: the source "
            f"by {first.by}, the target by {second.by}. Nothing was written."
        )
    return difference


def compare(first: Foreign, second: Foreign) -> int:
    """Return the number of tensors, which must be equal bit for bit.

    Raises:
        CheckpointError: tensors differ, or exist on one side only.

    Examples:
        >>> from polyshard.convert.format import lazy
        >>> compare(Foreign(tensors={"a": lazy(torch.ones(2))}), Foreign(tensors={"a": lazy(torch.ones(2))}))
        1
    """
    only = sorted(set(first.tensors) ^ set(second.tensors))
    if only:
        raise CheckpointError(f"verification failed: {len(only)} tensors exist on one side only: {', '.join(only[:5])}")
    for name, tensor in first.tensors.items():
        if fingerprint(tensor.load()) != fingerprint(second.tensors[name].load()):
            raise CheckpointError(f"verification failed: the written {name} differs from the one that was read")
    return len(first.tensors)


def logits_of(
    independent: Independent,
    config: Mapping[str, Any],
    ids: torch.Tensor,
    dtype: torch.dtype,
    rounded: torch.dtype | None,
    what: str,
) -> Reading:
    """Return the logits computed by an independent reader.

    Args:
        independent: see `CheckpointFormat.independent`.
        config: fields of config.json, for a reader that only provides tensors.
        ids: token IDs `[1, tokens]`.
        dtype: dtype to compute in.
        rounded: dtype to which weights are rounded first.
        what: "the source" or "the target", for errors.

    Raises:
        NotComparableError: transformers is missing or does not support the model.
        CheckpointError: a tensor is missing or unexpected.
    """
    if independent.logits is not None:
        return Reading(independent.logits(ids, rounded), independent.by)
    model, unread = _loaded(independent, config, dtype, what)
    try:
        with torch.no_grad():
            if rounded is not None:
                for parameter in model.parameters():
                    parameter.data = parameter.data.to(rounded).to(dtype)
            return Reading(model.eval()(ids)[0][0], independent.by, unread)
    except Exception as error:  # the model takes other inputs, or does not support the dtype
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise NotComparableError(f"{type(model).__name__} does not accept token ids: {lines[0][:200]}") from None


def _loaded(
    independent: Independent, config: Mapping[str, Any], dtype: torch.dtype, what: str
) -> tuple[Any, tuple[str, ...]]:
    try:
        import transformers
    except ImportError:
        raise NotComparableError("transformers is not installed") from None
    try:
        if independent.directory is not None:
            options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}
            options |= {"trust_remote_code": False, "local_files_only": True}
            if independent.gguf is not None:
                options["gguf_file"] = independent.gguf
            dequantizing = _dequantizing(transformers, independent.directory)
            options |= dequantizing
            model, report = _class(transformers, config).from_pretrained(independent.directory, **options)
            if dequantizing:  # move the weights into a plain model, which does not quantize activations
                state = {n: v for n, v in model.state_dict().items() if not n.endswith(("_scale", "_zero_point"))}
                model, report = _plain(transformers, config, state, dtype)
        else:
            assert independent.state is not None
            model, report = _plain(transformers, config, independent.state, dtype)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"transformers cannot load {what}: {lines[0][:200]}"
        if independent.gguf is None and config.get("model_type") in FAMILIES:
            raise CheckpointError(f"verification failed: {reason}") from None
        raise NotComparableError(reason) from None
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    missing = sorted(set(report["missing_keys"]) - ({"lm_head.weight"} if tied else set()))
    wrong = sorted(str(key) for key in report.get("mismatched_keys") or ())
    unexpected = sorted(
        n for n in report["unexpected_keys"] if not REDUNDANT.search(n) and not (tied and "lm_head" in n)
    )
    if missing or wrong or (unexpected and independent.directory is None):
        raise CheckpointError(
            f"verification failed: {what} by {independent.by} does not match the configuration: missing tensors "
            f"{some(missing)}; unexpected tensors {some(unexpected)}; wrong shape {some(wrong)}."
        )
    return model, tuple(unexpected)


def _dequantizing(transformers: Any, directory: Path) -> dict[str, Any]:
    """Return the options with which transformers dequantizes a directory, in float32 as the formats define it."""
    file = directory / "config.json"
    stated = (config_fields_of(file).get("quantization_config") or {}) if file.is_file() else {}
    makers = {
        "fp8": lambda: transformers.FineGrainedFP8Config(dequantize=True),
        "mxfp4": lambda: transformers.Mxfp4Config(dequantize=True),
        "compressed-tensors": lambda: transformers.CompressedTensorsConfig(run_compressed=False),
    }
    make = makers.get(str(stated.get("quant_method")))
    return {} if make is None else {"quantization_config": make(), "dtype": torch.float32}


def _class(transformers: Any, config: Mapping[str, Any]) -> Any:
    """Return the class that the configuration names, such as that of a classifier."""
    named = (config.get("architectures") or [""])[0]
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    return transformers.AutoModelForCausalLM if found is None else found


def _plain(transformers: Any, config: Mapping[str, Any], state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """Return a model of the configuration with these weights, and the names that did not match."""
    known = transformers.AutoConfig.for_model(**_for_transformers(config))
    model = transformers.AutoModelForCausalLM.from_config(known, attn_implementation="eager").to(dtype)
    return model, _load_state(model, state, dtype)


def _load_state(model: Any, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    wanted = set(model.state_dict())
    # The wrapper prefix that matches most names; other names are reported as missing or unexpected.
    prefix = max(PREFIXES, key=lambda p: len(wanted & {n.removeprefix(p) for n in state if n.startswith(p)}))
    named = {name.removeprefix(prefix): value.to(dtype) for name, value in state.items() if name.startswith(prefix)}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [name for name, value in named.items() if name in shapes and tuple(value.shape) != shapes[name]]
    result = model.load_state_dict({n: v for n, v in named.items() if n not in wrong}, strict=False)
    model.tie_weights()
    return {"missing_keys": result.missing_keys, "unexpected_keys": result.unexpected_keys, "mismatched_keys": wrong}


def _ids(config: Mapping[str, Any]) -> torch.Tensor:
    """Return token IDs for the logits: longer than the window if that is affordable, within the model's positions."""
    window = config.get("sliding_window")
    wanted = max(TOKENS, window + 16 if isinstance(window, int) and window <= 1024 else 0)
    most = config.get("max_position_embeddings")
    tokens = min(wanted, most) if isinstance(most, int) and most > 0 else wanted
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config["vocab_size"], (1, tokens), generator=generator)


def _for_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("architectures", "polyshard", "dtype")}
