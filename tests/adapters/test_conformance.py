"""All built-in adapters through the conformance suite."""

from support.suite_engines import ENGINES

from polyshard.testing import AdapterSuite


class TestTorch(AdapterSuite):
    adapter = "torch"
    engines = ENGINES["torch"]


class TestMegatron(AdapterSuite):
    adapter = "megatron"
    engines = ENGINES["megatron"]


class TestDeepspeed(AdapterSuite):
    adapter = "deepspeed"
    engines = ENGINES["deepspeed"]


class TestFairscale(AdapterSuite):
    adapter = "fairscale"
    engines = ENGINES["fairscale"]


class TestVllm(AdapterSuite):
    """vLLM's layers have no backward: their forward is judged in test_vllm_serving.py."""

    adapter = "vllm"
