"""The client of vLLM's own HTTP server, on any machine.

The server needs `VLLM_SERVER_DEV_MODE=1` for the routes of weight transfer, and `--enable-scale-out` for the route that
takes and gives token IDs.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyshard.adapters.vllm.clients.protocol import SampleAnswer, SampleRequest, token_versions
from polyshard.adapters.vllm.engines.rollout import refuse_stop_strings
from polyshard.adapters.vllm.engines.routing import ROUTING_METHOD, ROUTING_WORKER, unpacked_routing
from polyshard.core.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_HEALTH = 5.0  # seconds
# vLLM would fill in values that are not given from the checkpoint's generation_config.json.
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 16}


class HttpClient:
    """The client of a vLLM server, as started by `polyshard serve` or `vllm serve`.

    During a weight sync the server is paused. It finishes the requests that it has, keeps new ones waiting, and clears
    its prefix cache. If the sync fails it stays paused until one completes.

    Args:
        url: address of the server, such as `http://10.0.0.3:8000`.
        name: the engine's name, for messages; by default the URL.
        timeout: seconds after which a call without an answer is an error.
        headers: headers of each request, such as `Authorization`.

    Examples:
        >>> client = HttpClient("http://10.0.0.3:8000/", timeout=60)
        >>> client.name, client.host
        ('http://10.0.0.3:8000', '10.0.0.3')
    """

    def __init__(
        self, url: str, name: str | None = None, *, timeout: float = 600.0, headers: Mapping[str, str] | None = None
    ) -> None:
        self._url = url.rstrip("/")
        parts = urllib.parse.urlsplit(self._url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ConfigurationError(f"the server's address is not a URL: got {url!r}, expected http://HOST:PORT.")
        self.name, self.host = name or self._url, parts.hostname
        self._timeout, self._headers = timeout, dict(headers or {})
        self._unfinished: set[str] = set()
        self._lock = threading.Lock()
        self._version = ""
        self._asking = threading.Lock()
        self._known: frozenset[str] | None = None  # sampling parameters of the server

    def call(self, method: str, payload: Mapping[str, Any] | None) -> None:
        """Call the route of a weight-transfer method. Before an update begins, the server is paused."""
        if method == "start_weight_update":
            self._post("pause?mode=wait&clear_cache=true", {})
        self._post(method, payload or {})

    def unfinished(self) -> list[str]:
        """Return the IDs of this client's unfinished requests."""
        with self._lock:
            return sorted(self._unfinished)

    def abort(self, requests: list[str]) -> None:
        """Abort requests; calls of `generate` that wait for them return what they have."""
        # vLLM 0.32 puts a prefix before the ID that the request has given (token_in_token_out/serving.py).
        self._post("abort_requests", {"request_ids": [*requests, *(f"generate-tokens-{name}" for name in requests)]})

    def forget_cached(self, version: str) -> bool:
        """Set the weight version, and let the server go on; the pause has cleared its prefix cache."""
        self._post("update_weight_version", {"new_version": version})
        self._post("resume", {})
        self._version = version
        return True

    def generate(self, request: SampleRequest) -> SampleAnswer:
        """Sample one completion, and wait for it.

        Raises:
            ConnectionError: the server cannot be reached, or died.
            ConfigurationError: the server rejects the request, has no such sampling parameter, or keeps no routing
                although it is requested.
        """
        self._require_known(request.sampling)
        refuse_stop_strings(request.sampling)
        sampling = {**_NEUTRAL, **request.sampling, "n": 1, "logprobs": 0, "detokenize": False}
        body = {"request_id": request.id, "token_ids": list(request.prompt), "sampling_params": sampling}
        with self._lock:
            self._unfinished.add(request.id)
        try:
            (choice,) = self._post("inference/v1/generate", body)["choices"]
        finally:
            with self._lock:
                self._unfinished.discard(request.id)
        tokens = tuple(choice["token_ids"])
        logprobs = tuple(entry["logprob"] for entry in choice["logprobs"]["content"] or ())
        versions = token_versions(len(tokens), choice.get("weight_versions"), self._version)
        routing = None if request.routing_from is None or not tokens else self._routing(request, tokens)
        return SampleAnswer(tokens, logprobs, versions, choice["finish_reason"], routing)

    def _require_known(self, sampling: Mapping[str, Any]) -> None:
        """Raise `ConfigurationError` for sampling parameters that the server lacks: it would ignore them."""
        with self._asking:  # once, and not from each thread that samples
            if self._known is None:
                self._known = self._sampling_parameters()
        unknown = sorted(set(sampling) - self._known) if self._known else []
        if unknown:
            raise ConfigurationError(
                f"unknown sampling parameter {unknown[0]!r}: {self.name} has {', '.join(sorted(self._known))}"
            )

    def _sampling_parameters(self) -> frozenset[str]:
        """Return the names in the server's description of its routes; empty if it has none."""
        request = urllib.request.Request(f"{self._url}/openapi.json", headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                schemas = json.loads(answer.read())["components"]["schemas"]
            found = schemas["GenerateRequest"]["properties"]["sampling_params"]
            found = schemas[found["$ref"].rpartition("/")[2]] if "$ref" in found else found
            return frozenset(found["properties"])
        except (urllib.error.HTTPError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code >= 500:
                raise RuntimeError(f"the server failed at /openapi.json: {_message(error)}") from None
            logger.warning(
                "%s does not describe its routes (vLLM's --disable-fastapi-docs): it ignores sampling parameters that "
                "it does not know, such as misspelled ones",
                self.name,
            )
            return frozenset()
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"the server died, froze, or cannot be reached (/openapi.json: {error})") from error

    def _routing(self, request: SampleRequest, tokens: tuple[int, ...]) -> Mapping[str, torch.Tensor]:
        arguments = [[[*request.prompt, *tokens]], [request.routing_from]]
        try:
            results = self._post("collective_rpc", {"method": ROUTING_METHOD, "args": arguments})["results"]
        except RuntimeError as error:
            if not self.is_reachable():
                raise
            raise ConfigurationError(
                f"{self.name} keeps no routing ({error}). Start the server with "
                f"--worker-extension-cls={ROUTING_WORKER}, and with a registered model that has experts."
            ) from None
        (routing,) = unpacked_routing(results, 1)
        return routing

    def _about_path(self) -> str:
        """Return a hint for a URL such as http://10.0.0.3:8000/v1, which other clients want."""
        path = urllib.parse.urlsplit(self._url).path
        return f" Or omit {path!r} from its URL." if path else ""

    def is_reachable(self) -> bool:
        """Whether the server answers `/health`."""
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=_HEALTH) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False

    def _post(self, route: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", **self._headers}
        request = urllib.request.Request(f"{self._url}/{route}", json.dumps(body).encode(), headers)
        path = route.partition("?")[0]
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            told = _message(error)
            if error.code in (403, 404):
                raise ConfigurationError(
                    f"the server has no open route /{path}: {told}. Start it with VLLM_SERVER_DEV_MODE=1 and "
                    f"--enable-scale-out.{self._about_path()}"
                ) from None
            if error.code < 500:
                raise ConfigurationError(f"the server rejected /{path}: {told}") from None
            raise RuntimeError(f"the server failed at /{path}: {told}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            raise ConnectionError(f"the server died, froze, or cannot be reached (/{path}: {reason})") from error


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    if text.lstrip().startswith("<"):  # a page of another program
        return str(error)
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:300] or str(error)
