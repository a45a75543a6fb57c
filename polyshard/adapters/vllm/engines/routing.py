"""The experts that an engine's tokens took, asked of its workers."""

from __future__ import annotations

import base64
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polyshard.core.errors import ConfigurationError

ROUTING_WORKER = "polyshard.adapters.vllm.served.routing.RoutingWorker"
ROUTING_METHOD = "polyshard_routing"  # of the worker: (sequences, starts) to what `unpacked_routing` takes


def served_routing(
    llm: Any, sequences: Sequence[Sequence[int]], starts: Sequence[int] = ()
) -> list[dict[str, torch.Tensor]]:
    """Return the experts that a `vllm.LLM` took for the tokens of finished requests.

    Start the engine with `worker_extension_cls=ps.ROUTING_WORKER`. Its workers keep the choices of four million tokens,
    by prefix: tokens from the prefix cache have theirs. Of two requests with the same prefix, the later one counts.

    Args:
        llm: the engine, which serves a registered model.
        sequences: token IDs of each request: its prompt and the sampled tokens.
        starts: the first token of each sequence of which experts are returned; by default 0.

    Returns:
        For each sequence, the experts of all tokens from the start but the last, which the model never saw: int64
        `[tokens - 1 - start, experts per token]` by layer, in the order of descending scores.

    Raises:
        ConfigurationError: the engine was started without `worker_extension_cls=ps.ROUTING_WORKER`, or it has not
            computed a token since its weights were loaded, or no longer keeps it; or an argument is invalid.

    Examples:
        >>> llm = LLM("model", worker_extension_cls=ps.ROUTING_WORKER)  # needs vLLM  # doctest: +SKIP
        >>> output = llm.generate({"prompt_token_ids": [3, 1, 4]})[0]  # needs vLLM  # doctest: +SKIP
        >>> tokens = [3, 1, 4, *output.outputs[0].token_ids]  # needs vLLM  # doctest: +SKIP
        >>> served_routing(llm, [tokens])[0]["layers.0.mlp"].shape  # needs vLLM  # doctest: +SKIP
        torch.Size([18, 2])
    """
    if llm.llm_engine.vllm_config.parallel_config.worker_extension_cls != ROUTING_WORKER:
        raise ConfigurationError(
            "the engine keeps no routing. Start it with worker_extension_cls=ps.ROUTING_WORKER, or pass "
            "return_routing=True to ps.RolloutEngine."
        )
    ids = _checked_sequences(sequences, starts)
    return unpacked_routing(llm.collective_rpc(ROUTING_METHOD, args=(ids, list(starts))), len(ids))


def _checked_sequences(sequences: Any, starts: Sequence[int]) -> list[list[int]]:
    """Return the token IDs as lists, after a check of them and of the first tokens."""
    try:
        ids = [[operator.index(token) for token in sequence] for sequence in sequences]
    except TypeError as error:
        raise ConfigurationError(
            f"sequences are invalid: {error}, expected a list of token IDs for each request, its prompt and its "
            "sampled tokens."
        ) from None
    if len(starts) and len(starts) != len(ids):
        raise ConfigurationError(f"starts are invalid: got {len(starts)} for {len(ids)} sequences.")
    for index, (sequence, start) in enumerate(zip(ids, starts)):
        if not 0 <= start < max(1, len(sequence)):
            raise ConfigurationError(
                f"starts[{index}] is invalid: got {start}, expected a token of the sequence of {len(sequence)}."
            )
    return ids


def unpacked_routing(answers: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, torch.Tensor]]:
    """Return the experts of sequences, as the workers' `polyshard_routing` has sent them.

    Args:
        answers: of all workers, in the order of their ranks. Those of a pipeline stage are equal, and those of several
            stages have different layers.
        count: number of sequences.

    Raises:
        ConfigurationError: a worker has no experts of some tokens.
    """
    missing = max(answer["missing"] for answer in answers)
    if missing:
        raise ConfigurationError(
            f"the engine has no routing of {missing} tokens: it has not computed them, or no longer keeps "
            "them. Ask after each call of generate. Of several data-parallel engines of one server, only the first "
            "answers."
        )
    experts = {name: rows for answer in answers for name, rows in answer["experts"].items()}
    per_token = {name: number for answer in answers for name, number in answer["per_token"].items()}
    return [{name: _unpacked(rows[index], per_token[name]) for name, rows in experts.items()} for index in range(count)]


def _unpacked(rows: str, per_token: int) -> torch.Tensor:
    if not rows:
        return torch.zeros(0, per_token, dtype=torch.int64)
    return torch.frombuffer(bytearray(base64.b64decode(rows)), dtype=torch.int16).view(-1, per_token).long()
