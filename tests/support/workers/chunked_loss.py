"""The loss of a head in chunks beside that of all logits, on each rank."""

from __future__ import annotations

import torch

import polyshard as ps


def losses_without_rows(sizes: dict) -> list[float]:
    """The sum of the losses and of the log-probabilities of no row, and the norm of the gradient."""
    context = ps.initialize("torch", timeout=60, **sizes)
    head = ps.lm_head(16, 101, context)
    hidden, labels = torch.ones(0, 7, 16, requires_grad=True), torch.zeros(0, 14, dtype=torch.int64)
    loss = ps.lm_loss(hidden, head, labels, context, vocab_size=101)
    loss.backward()
    logprobs = ps.lm_logprobs(hidden, head, labels, context, vocab_size=101)
    gradients = [parameter.grad for parameter in head.parameters()]
    ps.shutdown(context)
    assert logprobs.shape == labels.shape
    return [loss.item(), *(0.0 if gradient is None else gradient.norm().item() for gradient in gradients)]


def losses_and_gradients(adapter: str, sizes: dict, bias: bool = False) -> tuple[dict, dict]:
    """In chunks, and of all logits: losses, log-probabilities, mean, gradients of hidden states and weight."""
    context = ps.initialize(adapter, timeout=60, **sizes)
    head = ps.lm_head(16, 101, context, bias=bias)
    ps.initialize_weights(head, context, seed=0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 101, (2, 14), generator=generator)
    labels[0, 3] = -100
    tokens = labels.clamp_min(0)
    found = []
    for chunked in (True, False):
        hidden = torch.randn(2, 14, 16, generator=torch.Generator().manual_seed(1))
        if context.layout.sequence_parallel:
            axis = context.axis("tensor")
            hidden = hidden.chunk(axis.size, dim=-2)[axis.rank].contiguous()
        hidden.requires_grad_()
        parameters = {name.rpartition(".")[2]: parameter for name, parameter in head.named_parameters()}
        head.zero_grad()
        options = {"vocab_size": 101}
        if chunked:
            losses = ps.lm_loss(hidden, head, labels, context, reduction="none", chunk_tokens=4, **options)
            logprobs = ps.lm_logprobs(hidden, head, tokens, context, chunk_tokens=4, **options)
            mean = ps.lm_loss(hidden, head, labels, context, chunk_tokens=4, **options)
        else:
            losses = ps.vocab_parallel_cross_entropy(head(hidden), labels, context, reduction="none", **options)
            logprobs = ps.token_logprobs(head(hidden), tokens, context, **options)
            mean = ps.vocab_parallel_cross_entropy(head(hidden), labels, context, **options)
        mean.backward()
        tensors = {"losses": losses, "logprobs": logprobs, "mean": mean, "hidden": hidden.grad}
        tensors |= {name: parameter.grad for name, parameter in parameters.items()}
        found.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
    ps.shutdown(context)
    return found[0], found[1]
