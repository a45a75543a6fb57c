"""Context parallel: one sequence over several ranks, by Ulysses (heads exchanged for tokens) or by a ring of keys."""

from polyshard.attention.context_parallel.parallel import context_parallel_attention
from polyshard.attention.context_parallel.shards import context_positions, context_shard, context_unshard

__all__ = ["context_parallel_attention", "context_positions", "context_shard", "context_unshard"]
