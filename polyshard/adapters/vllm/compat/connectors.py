"""vLLM's connectors to stores of KV cache outside of the engine, whose content is of the weights that computed it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

# They pass the KV cache of running requests from engine to engine, and keep none.
_KEEP_NOTHING = (
    *("NixlConnector", "NixlPullConnector", "NixlPushConnector", "P2pNcclConnector"),
    *("MoRIIOConnector", "MooncakeConnector", "DecodeBenchConnector"),
)


def connector_without_reset(vllm_config: VllmConfig) -> str | None:
    """Return the name of a connector that keeps KV cache and cannot drop it; None if the engine has none.

    vLLM takes such a connector's missing answer for success (v1/core/sched/scheduler.py, `reset_connector_cache`).
    """
    for config in _connectors(vllm_config.kv_transfer_config):
        name = config.kv_connector
        if name is not None and name not in _KEEP_NOTHING:
            found: Any = KVConnectorFactory.get_connector_class(config)
            if found.reset_cache is KVConnectorBase_V1.reset_cache:
                return name
    return None


def reset_caches(llm: Any) -> bool:
    """Drop an engine's prefix cache and what its connectors keep; return whether that succeeded."""
    return bool(llm.llm_engine.reset_prefix_cache(reset_connector=True))


def _connectors(config: KVTransferConfig | None) -> Iterator[KVTransferConfig]:
    if config is None:
        return
    yield config
    if config.kv_connector == "MultiConnector":
        for fields in config.kv_connector_extra_config.get("connectors", ()):
            given: dict[str, Any] = {"kv_role": config.kv_role, **fields}
            yield from _connectors(KVTransferConfig(**given))
