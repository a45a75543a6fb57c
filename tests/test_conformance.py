"""All built-in adapters through the conformance suite."""

from polyshard.testing import AdapterSuite


class TestTorch(AdapterSuite):
    adapter = "torch"
    engines = ({"data_parallel": "ddp"}, {"data_parallel": "fsdp"})


class TestMegatron(AdapterSuite):
    adapter = "megatron"
    engines = ({"zero_stage": 0}, {"zero_stage": 1})


class TestDeepspeed(AdapterSuite):
    adapter = "deepspeed"
    engines = ({"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3})


class TestFairscale(AdapterSuite):
    adapter = "fairscale"
    engines = ({"zero_stage": 1}, {"zero_stage": 2})


class TestVllm(AdapterSuite):
    """vLLM's layers have no backward: their forward is judged in test_vllm_serving.py."""

    adapter = "vllm"
