"""Routers: from logits to the experts of each token and their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from polyshard.core.errors import ConfigurationError, RoutingError
from polyshard.core.experts import Routing

Sigmoid = Callable[[torch.Tensor], torch.Tensor]
Score = Literal["softmax", "sigmoid", "softmax_of_chosen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """How a token's experts are chosen from the router's logits, and how their outputs are weighted.

    | family | router |
    |---|---|
    | Mixtral, Qwen3-MoE with `norm_topk_prob` | `Router(normalize=True)` |
    | OLMoE, Qwen2-MoE | `Router()` |
    | DeepSeek-V2 | `Router(groups=8, chosen_groups=3, best_of_group=1, scale=16.0, dtype=torch.float32)` |
    | DeepSeek-V3 | `Router(score="sigmoid", normalize=True, correction_bias=True, groups=8, chosen_groups=4, scale=2.5, dtype=torch.float32)` |
    | Llama 4 | `Router(score="sigmoid", scale_input=True)`, one expert per token |
    | ERNIE 4.5 | `Router(normalize=True, least_sum=1e-12, correction_bias=True, dtype=torch.float32)` |
    | gpt-oss | `Router(score="softmax_of_chosen", bias=True)` |
    | Granite | `Router(score="softmax_of_chosen")` |

    Attributes:
        score: `"softmax"` over all experts, `"sigmoid"` of each logit, or `"softmax_of_chosen"`: softmax over the
            logits of the chosen experts. Scores are computed in float32.
        normalize: divide the weights of a token by their sum.
        scale: factor of all weights.
        groups: number of groups of neighbouring experts.
        chosen_groups: experts are chosen within this many groups, those with the largest sum of their best scores.
        best_of_group: number of best scores of a group that are added to rank it: 2 in DeepSeek-V3, 1 in DeepSeek-V2.
        epsilon: added to the sum by which weights are divided (`normalize`); by default 1e-20 for `"sigmoid"`, else 0.
        least_sum: the sum by which weights are divided is at least this (`normalize`; ERNIE 4.5).
        correction_bias: add a bias `e_score_correction_bias` `[experts]` to the scores for the choice, not for the
            weights. It is float32 and has no gradient; see `polyshard.update_router_bias`.
        bias: add a bias to the logits.
        scale_input: multiply an expert's input by the weight, instead of its output.
        dtype: of the logits' matrix product; None for the model's.
        float32_weight: an engine keeps the matrix in float32, also if the model has another dtype (ERNIE 4.5). In exact
            mode, trainer and engine both have it in the model's dtype.

    Raises:
        ConfigurationError: the score is unknown, the groups are contradictory, or a value is of the wrong kind.

    Examples:
        >>> router = Router(normalize=True)
        >>> router.route(torch.tensor([[2.0, 1.0, 0.0]]), 2).experts
        tensor([[0, 1]])
    """  # noqa: E501

    score: Score = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    best_of_group: int = 2
    epsilon: float | None = None
    least_sum: float = 0.0
    correction_bias: bool = False
    bias: bool = False
    scale_input: bool = False
    dtype: torch.dtype | None = None
    float32_weight: bool = False

    def __post_init__(self) -> None:
        for name in ("scale", "least_sum", "epsilon"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value)) and (name, value) != ("epsilon", None):
                raise ConfigurationError(f"Router.{name} is invalid: got {value!r}, expected a finite number.")
        for name in ("groups", "chosen_groups", "best_of_group"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ConfigurationError(f"Router.{name} is invalid: got {value!r}, expected an integer.")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise ConfigurationError(f"Router.dtype is invalid: got {self.dtype!r}, expected a torch.dtype or None.")
        if self.score not in get_args(Score):
            raise ConfigurationError(
                f"The router's score is unknown: got {self.score!r}, expected {', '.join(get_args(Score))}."
            )
        if not 1 <= self.chosen_groups <= self.groups:
            raise ConfigurationError(
                f"The router's groups are invalid: got {self.chosen_groups} chosen of {self.groups}, expected at least "
                "one and at most all."
            )
        if self.best_of_group < 1 or (self.epsilon is not None and self.epsilon < 0) or self.least_sum < 0:
            raise ConfigurationError(
                f"The router is invalid: got best_of_group={self.best_of_group}, epsilon={self.epsilon} and "
                f"least_sum={self.least_sum}, expected at least 1, 0 and 0."
            )
        if self.score == "softmax_of_chosen" and (self.normalize or self.groups > 1 or self.correction_bias):
            raise ConfigurationError(
                "The router is contradictory: a softmax over the chosen experts is normalized already, and has no "
                "groups and no correction bias. Use score='softmax' or 'sigmoid'."
            )

    def check(self, num_experts: int, experts_per_token: int) -> None:
        """Raise `ConfigurationError` unless tokens can choose so many of the experts."""
        each, rest = divmod(num_experts, self.groups)
        if not 1 <= experts_per_token <= num_experts:
            raise ConfigurationError(
                f"The number of experts per token is invalid: got {experts_per_token}, expected 1 to {num_experts}, "
                "the number of experts."
            )
        if rest or experts_per_token > each * self.chosen_groups or (self.groups > 1 and each < self.best_of_group):
            raise ConfigurationError(
                f"The router's groups do not fit the experts: got {self.groups} groups of {num_experts} experts, of "
                f"which {self.chosen_groups} are chosen, expected groups of equal size, with {self.best_of_group} "
                f"experts or more, that hold {experts_per_token} experts per token."
            )

    def simplest(self) -> Router:
        """Return a router that computes the same up to rounding, without settings that have no effect.

        A softmax over the chosen experts is a softmax over all experts that is normalized over the chosen ones.
        """
        router = self
        if router.score == "softmax_of_chosen":
            router = replace(router, score="softmax", normalize=True, epsilon=0.0, least_sum=0.0)
        if router.chosen_groups == router.groups:
            router = replace(router, groups=1, chosen_groups=1, best_of_group=2)
        if not router.normalize:
            return replace(router, epsilon=0.0, least_sum=0.0)
        return replace(router, epsilon=router._added)

    @property
    def _added(self) -> float:
        """The number that is added to the sum by which weights are divided."""
        return self.epsilon if self.epsilon is not None else 1e-20 if self.score == "sigmoid" else 0.0

    def scores(self, logits: torch.Tensor, sigmoid: Sigmoid = torch.sigmoid) -> torch.Tensor:
        """Return the scores `[tokens, experts]` of all experts, in float32 (float64 for float64)."""
        logits = _wide(logits)
        return sigmoid(logits) if self.score == "sigmoid" else logits.softmax(-1)

    def route(
        self,
        logits: torch.Tensor,
        experts_per_token: int,
        correction: torch.Tensor | None = None,
        experts: torch.Tensor | None = None,
        sigmoid: Sigmoid = torch.sigmoid,
    ) -> Routing:
        """Choose the experts of each token.

        Args:
            logits: `[tokens, experts]`.
            experts_per_token: number of experts per token.
            correction: float32 `[experts]`, added to the scores for the choice.
            experts: int64 `[tokens, experts per token]` to take instead of choosing; -1 to choose. Their weights are
                computed from `logits`, so that the router has a gradient.
            sigmoid: the sigmoid of the scores; in exact mode, one whose bits do not depend on the batch.

        Returns:
            The routing, in the order of descending scores.

        Raises:
            RoutingError: on CPU, a logit or a correction is not finite.
        """
        if logits.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_finite(logits, correction)
        if self.score == "softmax_of_chosen":
            logits = _wide(logits)
            experts = _taken(experts, logits.detach().topk(experts_per_token, dim=-1).indices)
            return Routing(weights=logits.gather(1, experts).softmax(-1) * self.scale, experts=experts)
        scores = self.scores(logits, sigmoid)
        with torch.no_grad():
            choice = scores if correction is None else scores + correction
            if self.groups > 1:
                choice = self._within_groups(choice)
            experts = _taken(experts, choice.topk(experts_per_token, dim=-1).indices)
        weights = scores.gather(1, experts)
        if self.normalize:
            total, *rest = weights.unbind(-1)
            for weight in rest:  # one by one, not in an order of a reduction's own
                total = total + weight
            total = total + self._added
            total = total.clamp(min=self.least_sum) if self.least_sum else total
            weights = weights / total.unsqueeze(-1)
        return Routing(weights=weights * self.scale if self.scale != 1.0 else weights, experts=experts)

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """Return the scores with those outside of the chosen groups at minus infinity."""
        grouped = choice.unflatten(-1, (self.groups, -1))
        best = grouped.topk(self.best_of_group, dim=-1).values.sum(-1).topk(self.chosen_groups, dim=-1).indices
        kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter_(1, best, True)
        return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def _check_finite(logits: torch.Tensor, correction: torch.Tensor | None) -> None:
    if not logits.isfinite().all():
        bad = int((~logits.isfinite().all(-1)).sum())
        raise RoutingError(
            f"The router's logits are not finite for {bad} of {logits.shape[0]} tokens. The hidden states or the "
            "router's weights hold NaN or infinity: check the learning rate, or load an earlier checkpoint."
        )
    if correction is not None and not correction.isfinite().all():  # every token would choose an expert with NaN
        bad = int((~correction.isfinite()).sum())
        raise RoutingError(
            f"The router's correction bias is not finite for {bad} of {correction.numel()} experts. Load an earlier "
            "checkpoint."
        )


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _taken(given: torch.Tensor | None, chosen: torch.Tensor) -> torch.Tensor:
    return chosen if given is None else torch.where(given < 0, chosen, given)
