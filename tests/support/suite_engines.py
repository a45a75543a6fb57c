"""The engines that the conformance suite tries, by adapter."""

ENGINES = {
    "torch": ({"data_parallel": "ddp"}, {"data_parallel": "fsdp"}),
    "megatron": ({"zero_stage": 0}, {"zero_stage": 1}),
    "deepspeed": ({"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}),
    "fairscale": ({"zero_stage": 1}, {"zero_stage": 2}),
}
