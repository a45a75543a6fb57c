"""The pipeline stages of one rank."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError, LayoutError
from polyshard.core.pipeline_plan import PipelinePlan


class Stages(nn.Module):
    """The pipeline stages of this rank. Parameters have the names that they have in the full model.

    `build_stages` makes it, and the engine of an adapter trains it with `train_batch`. A weight that two stages of this
    rank hold, such as a tied embedding in a V placement, is one parameter.

    Attributes:
        plan: the plan of all stages.
        numbers: the numbers of this rank's stages, in increasing order.

    Examples:
        >>> stages = Stages([torch.nn.Linear(2, 2)], (0,), ps.pipeline_plan(1, 1))
        >>> [name for name, _ in stages.named_parameters()]
        ['weight', 'bias']
    """

    def __init__(self, stages: Sequence[nn.Module], numbers: Sequence[int], plan: PipelinePlan) -> None:
        super().__init__()
        self.plan = plan
        self.numbers = tuple(numbers)
        self._names = tuple(f"stage_{number}" for number in numbers)
        for name, stage in zip(self._names, stages):
            self.add_module(name, stage)
        _share_parameters(list(self))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self._modules[name] for name in self._names])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._names)

    @property
    def last(self) -> nn.Module | None:
        """The stage with the model's head, on the rank that holds it; None on the others."""
        *_, module = self
        return module if self.numbers[-1] == self.plan.num_stages - 1 else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, if it has one stage.

        Raises:
            ConfigurationError: the model has several stages.
        """
        if self.plan.num_stages == 1:
            (module,) = self
            return module(*args, **kwargs)
        raise ConfigurationError(
            f"A model of {self.plan.num_stages} pipeline stages has no forward pass of its own. Use engine.train_batch "
            "or engine.eval_batch."
        )

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the last stage, on the rank that holds it.

        Raises:
            ConfigurationError: this rank does not hold the last stage.
        """
        module: Any = self.last
        if module is None:
            raise ConfigurationError(
                f"This rank has no head: it holds stage {', '.join(map(str, self.numbers))} of {self.plan.num_stages}, "
                "and the last one computes logits."
            )
        return module.compute_logits(hidden)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, Any], Any, None]:
        """Yield the modules of all stages by their names in the full model, and this module."""
        memo = set() if memo is None else memo
        if not remove_duplicate or self not in memo:
            memo.add(self)
            yield prefix, self
        for stage in self:
            yield from stage.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Return the state of all stages by names of the full model."""
        del args, kwargs
        return {
            name: value
            for stage in self
            for name, value in stage.state_dict(prefix=prefix, keep_vars=keep_vars).items()
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Raise: use `polyshard.load_checkpoint`, which reads this rank's part of a model."""
        raise ConfigurationError("Stages do not load a state_dict. Use polyshard.load_checkpoint.")

    @property
    def stage_of_parameter(self) -> dict[str, int]:
        """The number of the stage that holds each parameter; the first one of a shared parameter."""
        found: dict[str, int] = {}
        for number, stage in zip(self.numbers, self):
            for name, _ in stage.named_parameters():
                found.setdefault(name, number)
        return found


def _share_parameters(stages: Sequence[nn.Module]) -> None:
    """Give stages of one rank the same Parameter where they hold a weight of the same name."""
    first: dict[str, nn.Parameter] = {}
    for stage in stages:
        for name, parameter in list(stage.named_parameters()):
            kept = first.setdefault(name, parameter)
            if kept is parameter:
                continue
            if kept.shape != parameter.shape or kept.dtype != parameter.dtype:
                raise LayoutError(
                    f"The weight {name} differs between pipeline stages: got {tuple(parameter.shape)} "
                    f"{parameter.dtype}, expected {tuple(kept.shape)} {kept.dtype}."
                )
            for module in stage.modules():
                for key, value in module._parameters.items():
                    if value is parameter:
                        module._parameters[key] = kept
