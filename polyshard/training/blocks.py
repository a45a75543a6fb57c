"""The modules that an option of an engine chooses, by default the blocks of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from polyshard.core.errors import ConfigurationError


def chosen_modules(
    model: nn.Module, option: str, value: object, choose: Callable[[nn.Module], bool] | None
) -> list[nn.Module]:
    """Return the modules that a function chooses; without a function the blocks: the items of every `ModuleList`.

    Args:
        model: as built.
        option: name of the engine's option, for the error.
        value: value of the option, for the error.
        choose: the function, or None.

    Raises:
        ConfigurationError: there is no such module.

    Examples:
        >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.ReLU()])})
        >>> chosen_modules(model, "recompute", "full", None)
        [Linear(in_features=2, out_features=2, bias=True), ReLU()]
    """
    blocks = {id(item) for module in model.modules() if isinstance(module, nn.ModuleList) for item in module}
    chosen = [m for m in model.modules() if (id(m) in blocks if choose is None else choose(m))]
    if not chosen:
        raise ConfigurationError(
            f"{option}={value!r} finds nothing to {option} in {type(model).__name__}: it has no ModuleList, or the "
            "function chose no module. Pass a function that returns True for the modules to choose."
        )
    return chosen


def replace_forwards(
    modules: Iterable[nn.Module], wrap: Callable[[Callable[..., object]], Callable[..., object]]
) -> Callable[[], None]:
    """Replace `forward` on each instance, so that parameters keep their names; return a function that undoes it."""
    found = [(module, module.__dict__.get("forward")) for module in modules]
    for module, _ in found:
        module.forward = wrap(module.forward)

    def undo() -> None:
        for module, previous in found:
            module.__dict__.pop("forward", None)
            if previous is not None:
                module.forward = previous

    return undo
