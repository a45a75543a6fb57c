"""Attention over a context axis, beside the same attention in one process."""

import torch
import torch.utils.checkpoint

import polyshard as ps
from polyshard.attention.kernel_call import run_kernel
from polyshard.core.attention import AttentionSpec


def both_ways(way, heads, kv_heads, lengths, dtype, rows=1, sinks=False, kernel=None, **features):
    """Return (output, gradients) of this rank's part, and those of a single process."""
    context = ps.initialize("torch", context=2, timeout=60)
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, 16), (tokens, kv_heads, 16), (tokens, kv_heads, 16), (tokens, heads, 16)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    logits = torch.randn(heads, generator=generator).to(dtype) if sinks else None
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=16, scale=0.25, sinks=sinks, **features)
    sequences = ps.pack(torch.tensor([0, *torch.tensor(lengths).cumsum(0)]), tokens)

    def leaves(tensors):
        return [None if t is None else t.clone().requires_grad_() for t in tensors]

    def cut(x):
        return ps.context_shard(x.unflatten(0, (rows, -1)), context, dim=1).flatten(0, 1)

    whole = leaves((q, k, v, logits))
    torch.manual_seed(3)
    expected = run_kernel(*whole[:3], sequences, spec, True, kernel, sinks=whole[3])
    expected.backward(grad)
    mine = leaves((cut(q), cut(k), cut(v), logits))
    torch.manual_seed(3)
    options = {"rows": rows, "sinks": mine[3], "kernel": kernel}
    out = ps.context_parallel_attention(*mine[:3], sequences, spec, context, way, **options)
    out.backward(cut(grad))
    got, wanted = [out.detach()], [cut(expected.detach())]
    for a, b in zip(mine[:3], whole[:3]):
        got.append(a.grad)
        wanted.append(cut(b.grad))
    if sinks:
        got.append(context.axis("context").collectives.all_reduce(mine[3].grad))
        wanted.append(whole[3].grad)
    ps.shutdown(context)
    return list(zip(got, wanted))


def modules(way, packed):
    """Return a module's output and weight gradients over two ranks, and in a single process."""
    context = ps.initialize("torch", context=2, timeout=60)
    torch.manual_seed(0)
    options = {"rotary": ps.RotaryEmbedding(16), "qk_norm_eps": 1e-6, "sinks": True, "context_parallel": way}
    sharded = ps.TrainableFlashAttention(32, 4, 2, 16, parallel_context=context, **options)
    alone = ps.TrainableFlashAttention(
        32,
        4,
        2,
        16,
        parallel_context=ps.GroupContext(layout=ps.ParallelLayout(), device=context.device, linear=context.linear),
        **options,
    )
    alone.load_state_dict(sharded.state_dict())
    for parameter in sharded.parameters():
        torch.distributed.broadcast(parameter.data, 0)
    alone.load_state_dict(sharded.state_dict())
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    bounds = {"cu_seqlens": torch.tensor([0, 5, 17, 24])} if packed else {}
    x = x if packed else x.view(2, 12, 32)
    dim = 0 if packed else 1
    alone(x, **bounds).square().sum().backward()
    part = ps.context_shard(x, context, dim)
    out = sharded(part, **bounds)
    out.square().sum().backward()
    whole = ps.context_unshard(out, context, dim)
    pairs = [(whole, alone(x, **bounds).detach())]
    reduce = context.axis("context").collectives.all_reduce
    pairs += [(reduce(a.grad), b.grad) for a, b in zip(sharded.parameters(), alone.parameters())]
    ps.shutdown(context)
    return pairs


def misuse():
    context = ps.initialize("torch", context=2, timeout=60)
    spec = AttentionSpec(num_heads=3, num_kv_heads=3, head_dim=16, scale=0.25)
    q = torch.randn(4, 3, 16)
    messages = []
    calls = [
        lambda: ps.context_shard(torch.zeros(6), context),
        lambda: ps.context_parallel_attention(q, q, q, ps.pack(torch.tensor([0, 4]), 4), spec, context),
        lambda: ps.context_parallel_attention(q, q, q, ps.pack(torch.tensor([0, 8]), 8), spec, context, "ulysses"),
    ]
    for call in calls:
        try:
            call()
        except ps.PolyshardError as error:
            messages.append(str(error))
    ps.shutdown(context)
    return messages


def without_rows(way):
    """A module's output for a batch without rows, and the gradients of its parameters."""
    context = ps.initialize("torch", context=2, timeout=60)
    module = ps.TrainableFlashAttention(32, 4, 2, parallel_context=context, context_parallel=way)
    out = module(torch.ones(0, 8, 32))
    out.sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    ps.shutdown(context)
    return out.shape, [float(gradient.abs().max()) for gradient in gradients if gradient is not None]


def over_the_tensor_axis(sequence_parallel):
    """A module with every feature over two tensor-parallel ranks, beside the module alone; dropout included."""
    context = ps.initialize("torch", tensor=2, timeout=60, sequence_parallel=sequence_parallel)
    single = ps.GroupContext(layout=ps.ParallelLayout(), device=context.device, linear=context.linear)
    features = {"sinks": True, "alibi": True, "value_dim": 24, "softcap": 3.0, "sliding_window": 9, "dropout": 0.3}
    modules = []
    for where in (context, single):
        module = ps.TrainableFlashAttention(
            32, 4, 1, 16, parallel_context=where, qkv_bias=True, qk_norm_eps=1e-6, **features
        )
        ps.initialize_weights(module, where, initializer=_drawn)
        modules.append(module)
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 9, 24])
    group, rank = context.axis("tensor").collectives, context.get_tensor_parallel_rank()
    outs = []
    for module, part in zip(modules, (x.chunk(2)[rank] if sequence_parallel else x, x)):
        torch.manual_seed(5)
        # The checkpoint draws the same dropout when it runs again.
        out = torch.utils.checkpoint.checkpoint(module, part, cu_seqlens=bounds, use_reentrant=False)
        out.square().sum().backward()
        outs.append(out.detach())
    whole = group.all_gather(outs[0], 0) if sequence_parallel else outs[0]
    pairs = [(whole, outs[1])]
    wanted = {name: p.grad for name, p in modules[1].named_parameters()}
    table = ps.collect_layouts(modules[0])
    for name, parameter in modules[0].named_parameters():
        shards = list(group.all_gather(parameter.grad.unsqueeze(0), 0))
        pairs.append((table[name].layout.assemble(shards), wanted[name]))
    ps.shutdown(context)
    return pairs


def _drawn(name, shape, generator):
    return torch.randn(shape, generator=generator) * 0.4 + (1.0 if "norm" in name else 0.0)
