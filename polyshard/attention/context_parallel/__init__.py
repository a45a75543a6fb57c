"""Context parallelism: one sequence over several ranks, with Ulysses (all-to-all over heads) or ring attention."""

from polyshard.attention.context_parallel.parallel import context_parallel_attention
from polyshard.attention.context_parallel.shards import context_positions, context_shard, context_unshard

__all__ = ["context_parallel_attention", "context_positions", "context_shard", "context_unshard"]
