"""A mixture-of-experts block run with random weights, to find the router with which polyshard computes the same."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from polyshard.core.errors import ConfigurationError
from polyshard.core.experts import ClampedSwiglu
from polyshard.experts.router import Router
from polyshard.transformers.replaced.recognize import NotRecognised

_TOKENS, _LOW, _SIZE = 40, 8, 4  # tokens, those with low scores for all experts, and expert size
_EPSILONS = (None, 1e-6)  # added to the sum of the weights: by default 1e-20 or 0, and in LFM2
_GROUPS, _CHOSEN_GROUPS = ("n_group", "num_group", "n_groups"), ("topk_group", "topk_groups")
_LEAST_SUMS = ("norm_min", "moe_norm_min")
_WIDE = 50.0  # factor that makes the scores of most experts smaller than any least sum
_SCALES = ("routed_scaling_factor", "router_scaling_factor", "moe_router_scaling_factor", "route_scale")


def first_number(names: tuple[str, ...], *holders: Any) -> Any:
    """Return the first number among the attributes of some objects; None without one."""
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)), None)


def tensor_at(block: nn.Module, path: str | None) -> Any:
    """Return the parameter or buffer at a path in a module; None without one."""
    owner, _, name = (path or "").rpartition(".")
    return getattr(block.get_submodule(owner), name, None) if path else None


def is_transposed(experts: Any, hidden_size: int) -> bool:
    """Whether stacked experts are `[experts, hidden, 2 * size]` and `[experts, size, hidden]`, as in gpt-oss."""
    given = getattr(experts, "is_transposed", None)
    return experts.gate_up_proj.shape[2] != hidden_size if given is None else given


class BlockTrial:
    """A block with random weights and small experts, and what `MixtureOfExperts` computes for the same weights."""

    def __init__(self, block: Any, sizes: dict[str, Any]) -> None:
        self.sizes, self.generator = sizes, torch.Generator().manual_seed(0)
        self.block: Any = copy.deepcopy(block).eval()
        self.transposed = is_transposed(block.experts, sizes["hidden_size"])
        self.interleaved = not getattr(block.experts, "is_concatenated", True)
        count, hidden, small = sizes["num_experts"], sizes["hidden_size"], _SIZE
        self.gate_up, self.down = self._draw(count, 2 * small, hidden), self._draw(count, hidden, small)
        experts = {"gate_up_proj": self.gate_up, "down_proj": self.down}
        if self.transposed:
            experts = {name: weight.transpose(1, 2).contiguous() for name, weight in experts.items()}
        self.gate_up_bias, self.down_bias = self._draw(count, 2 * small), self._draw(count, hidden)
        if sizes["bias"]:
            experts |= {"gate_up_proj_bias": self.gate_up_bias, "down_proj_bias": self.down_bias}
        for name, weight in experts.items():
            setattr(self.block.experts, name, nn.Parameter(weight, requires_grad=False))
        for name in ("intermediate_size", "intermediate_dim", "expert_dim"):
            if isinstance(getattr(self.block.experts, name, None), int):
                setattr(self.block.experts, name, small)
        if hasattr(self.block.experts, "config"):
            self.block.experts.config = copy.copy(self.block.experts.config)
            self.block.experts.config._experts_implementation = "eager"
        if sizes["shared"] is not None:
            for child in ("gate_proj", "up_proj", "down_proj"):
                shape = (hidden, small) if child == "down_proj" else (small, hidden)
                layer = nn.Linear(shape[1], shape[0], bias=False, device="cpu", dtype=torch.float32)
                layer.weight = nn.Parameter(self._draw(*shape), requires_grad=False)
                setattr(getattr(self.block, sizes["shared"].name), child, layer)
        for module in self.block.modules():  # the router, and the gate of shared experts
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.is_meta:
                    new = self._draw(*tensor.shape)
                    held = module._parameters if name in module._parameters else module._buffers
                    held[name] = nn.Parameter(new, requires_grad=False) if name in module._parameters else new
        self.x = torch.cat((self._draw(_TOKENS - _LOW, hidden) * hidden**0.5, self._with_low_scores()))

    def _draw(self, *shape: int) -> torch.Tensor:
        """Return normal numbers whose sums over the last dimension are of the order of 1."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu") * shape[-1] ** -0.5

    def _with_low_scores(self) -> torch.Tensor:
        """Return tokens whose sigmoid scores are about 1e-5, so that what is added to their sum can be seen."""
        matrix = tensor_at(self.block, self.sizes["matrix"]).detach().float()
        logits = torch.randn(_LOW, len(matrix), generator=self.generator, dtype=torch.float32, device="cpu") - 12
        return torch.linalg.lstsq(matrix, logits.T).solution.T.contiguous()

    @torch.no_grad()
    def router(self, config: Any) -> tuple[Router, bool]:
        """Return the router with which `MixtureOfExperts` computes the same, and whether the block returns a pair."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                output = self.block(self.x[None])
                pair = isinstance(output, tuple)
                wanted = self._tokens(output)
                trials = [(self, wanted), *((wide, wide._tokens(wide.block(wide.x[None]))) for wide in self._wide())]
                noisy = not torch.equal(self._tokens(self.block.train()(self.x[None].clone())), wanted)
                dtype = self._router_dtype()
        except Exception as error:  # transformers' code may raise anything
            raise NotRecognised(f"it cannot be run: {type(error).__name__}: {error}") from error
        finally:
            torch.set_default_dtype(before)
        if noisy:
            raise NotRecognised("in training it adds noise or draws experts at random, unlike polyshard.Router")
        for router in self._candidates(config, dtype):
            if all(_near(trial._computed(router), output) for trial, output in trials):
                return router, pair
        activation = getattr(self.block.experts, "act_fn", None)
        tried = torch.linspace(-4.0, 4.0, 17, dtype=torch.float32, device="cpu")
        if isinstance(activation, nn.Module) and not torch.allclose(activation(tried), F.silu(tried), atol=1e-5):
            raise NotRecognised(f"its experts' activation is {type(activation).__name__}, expected SiLU")
        raise NotRecognised("no polyshard.Router chooses and weights experts as it does")

    def _wide(self) -> list[BlockTrial]:
        """Return this trial with larger inputs and correction, if the sum of the weights has a least value.

        The correction then makes tokens choose experts whose scores are almost 0.
        """
        if self.sizes["correction"] is None or self._least_sum(self.block) is None:
            return []
        wide = copy.copy(self)
        wide.block, wide.x = copy.deepcopy(self.block), self.x * _WIDE
        tensor_at(wide.block, self.sizes["correction"]).mul_(_WIDE)
        return [wide]

    def _least_sum(self, *holders: Any) -> float | None:
        return first_number(_LEAST_SUMS, getattr(self.block, self.sizes["router_name"]), *holders)

    def _tokens(self, output: Any) -> torch.Tensor:
        return (output[0] if isinstance(output, tuple) else output).reshape(_TOKENS, -1)

    def _candidates(self, config: Any, dtype: torch.dtype | None) -> Iterator[Router]:
        module = getattr(self.block, self.sizes["router_name"])
        holders = module, self.block, config
        groups, chosen = first_number(_GROUPS, *holders), first_number(_CHOSEN_GROUPS, *holders)
        grouped = [
            (1, 1, 2),
            *([(groups, chosen, best) for best in (2, 1)] if groups and chosen and groups > 1 else []),
        ]
        scales = {1.0, float(first_number(_SCALES, *holders) or 1.0)}
        scores = ("softmax", "sigmoid", "softmax_of_chosen")
        least_sums = dict.fromkeys((float(self._least_sum(*holders) or 0), 0.0))
        ways = itertools.product(scores, (True, False), grouped, scales, (False, True), _EPSILONS, least_sums)
        for score, normalize, (among, within, best), scale, scale_input, epsilon, least in ways:
            if (epsilon is not None and not (normalize and score == "sigmoid")) or (least and not normalize):
                continue
            options: dict[str, Any] = {"score": score, "normalize": normalize, "epsilon": epsilon, "least_sum": least}
            options |= {"groups": among, "chosen_groups": within, "best_of_group": best}
            correction, bias = self.sizes["correction"] is not None, self.sizes["router_bias"] is not None
            options |= {"correction_bias": correction, "bias": bias, "scale": scale, "scale_input": scale_input}
            try:
                router = Router(**options, dtype=dtype)
                router.check(self.sizes["num_experts"], self.sizes["per_token"])
            except ConfigurationError:  # a contradictory combination
                continue
            yield router

    def _computed(self, router: Router) -> torch.Tensor:
        """Return what `MixtureOfExperts` computes with a router: `[tokens, hidden]`."""
        matrix, bias, correction = (
            tensor_at(self.block, self.sizes[part]) for part in ("matrix", "router_bias", "correction")
        )
        correction = None if correction is None else correction.view(-1)
        routing = router.route(F.linear(self.x, matrix, bias), self.sizes["per_token"], correction)
        weights, chosen = routing.weights.unsqueeze(-1), routing.experts
        rows = (
            self.x.unsqueeze(1) * weights if router.scale_input else self.x.unsqueeze(1).expand(-1, chosen.shape[1], -1)
        )
        hidden = torch.einsum("tkh,tkch->tkc", rows, self.gate_up[chosen])
        hidden = hidden + self.gate_up_bias[chosen] if self.sizes["bias"] else hidden
        gate, up = (hidden[..., ::2], hidden[..., 1::2]) if self.interleaved else hidden.chunk(2, dim=-1)
        activation = self.sizes["activation"]
        if isinstance(activation, ClampedSwiglu):
            gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
            hidden = (up + 1) * (gate * torch.sigmoid(gate * activation.alpha))
        else:
            hidden = F.silu(gate) * up
        y = torch.einsum("tkc,tkhc->tkh", hidden, self.down[chosen])
        y = y + self.down_bias[chosen] if self.sizes["bias"] else y
        y = y.sum(1) if router.scale_input else (y * weights).sum(1)
        shared = self.sizes["shared"]
        if shared is None:
            return y
        mlp = getattr(self.block, shared.name)
        dense = mlp.down_proj(F.silu(mlp.gate_proj(self.x)) * mlp.up_proj(self.x))
        return y + (F.sigmoid(self.block.shared_expert_gate(self.x)) * dense if shared.gated else dense)

    def _router_dtype(self) -> torch.dtype | None:
        """Return the dtype of the router's matrix product if it is not that of the model."""
        shape, seen = tensor_at(self.block, self.sizes["matrix"]).shape, []

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is F.linear and len(args) > 1 and args[1].shape == shape:
                    seen.append(args[1].dtype)
                return func(*args, **(kwargs or {}))

        half = copy.deepcopy(self.block).eval().bfloat16()
        with Watch():
            half(self.x[None].bfloat16())
        return torch.float32 if torch.float32 in seen else None


def _near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
