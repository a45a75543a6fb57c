"""The `vllm.general_plugins` entry point: vLLM calls `register` in every process it starts.

vLLM only logs a plugin that cannot be imported, so this module imports almost nothing. An exception raised inside
`register` ends the process with its message.
"""

from __future__ import annotations


def register() -> None:
    """Register every model, and polyshard's weight transfer backend, with vLLM.

    Raises:
        RegistrationError: a factory cannot be found, or the environment variable is malformed.
    """
    from polyshard.adapters.vllm import adapter
    from polyshard.adapters.vllm.compat import register_transfer
    from polyshard.registry import factory_of, registered_models

    register_transfer("polyshard", "polyshard.adapters.vllm.transfer.worker", "PolyshardTransfer")
    models = registered_models()
    if not models:
        return
    server = adapter.server
    for model in models.values():
        server.register(model, factory_of(model))
