"""All that polyshard relies on in vLLM, by name and signature: a new vLLM breaks this file with a readable message."""

import inspect

import pytest

pytestmark = pytest.mark.vllm

SIGNATURES = {
    "ColumnParallelLinear": ("input_size", "output_size", "bias", "gather_output", "return_bias"),
    "MergedColumnParallelLinear": ("input_size", "output_sizes", "bias", "return_bias"),
    "QKVParallelLinear": (
        "hidden_size",
        "head_size",
        "total_num_heads",
        "total_num_kv_heads",
        "bias",
        "return_bias",
    ),
    "RowParallelLinear": ("input_size", "output_size", "bias", "input_is_parallel", "return_bias"),
    "VocabParallelEmbedding": ("num_embeddings", "embedding_dim"),
    "ParallelLMHead": ("num_embeddings", "embedding_dim", "bias"),
    "RMSNorm": ("hidden_size", "eps"),
    "Attention": (
        "num_heads",
        "head_size",
        "scale",
        "num_kv_heads",
        "cache_config",
        "quant_config",
        "per_layer_sliding_window",
        "prefix",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_constructors_take_what_we_pass(name):
    from polyshard.adapters.vllm import compat

    known = inspect.signature(getattr(compat, name).__init__).parameters
    missing = [parameter for parameter in SIGNATURES[name] if parameter not in known]
    assert not missing, f"vLLM's {name} no longer takes {missing}: mend adapters/vllm/compat.py"


def test_fused_loaders_take_a_shard_id():
    from polyshard.adapters.vllm import compat

    for cls in (compat.QKVParallelLinear, compat.MergedColumnParallelLinear):
        assert list(inspect.signature(cls.weight_loader).parameters)[1:4] == [
            "param",
            "loaded_weight",
            "loaded_shard_id",
        ]


def test_the_group_coordinator_has_what_a_context_reads():
    from vllm.distributed.parallel_state import GroupCoordinator

    for method in ("all_reduce", "all_gather", "reduce_scatter"):
        assert callable(getattr(GroupCoordinator, method))
    source = inspect.getsource(GroupCoordinator.__init__)
    assert all(f"self.{name}" in source for name in ("ranks", "rank_in_group", "world_size", "device_group"))


def test_general_plugins_are_loaded_by_entry_point():
    from importlib.metadata import entry_points

    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    (plugin,) = [p for p in entry_points(group=DEFAULT_PLUGINS_GROUP) if p.name == "polyshard"]
    assert callable(plugin.load())


def test_registry_and_model_protocol():
    import decoder
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces_base import is_text_generation_model, is_vllm_model

    from polyshard.adapters.vllm.model import make_model_class
    from polyshard.core.host import RegisteredModel

    cls = make_model_class(RegisteredModel(name="Contract", reference="decoder:build_model"), decoder.build_model)
    assert is_vllm_model(cls)
    assert is_text_generation_model(cls)
    assert callable(ModelRegistry.register_model)
