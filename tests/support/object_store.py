"""An S3 server on this machine: that of moto, which s3fs and botocore talk to as to any other."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"

# Sees each request before the server does: method and path.
Watcher = Callable[[str, str], None]


def client_settings(address: str, port: int) -> dict[str, str]:
    """Return the environment variables with which `s3://` means this server."""
    return {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{address}:{port}",
    }


class ObjectStore:
    """A running server with an empty bucket.

    Attributes:
        watcher: called with each request, before it changes anything; it may raise an HTTPException of werkzeug.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.exceptions import HTTPException
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_: Any) -> None:
                pass

        application = DomainDispatcherApplication(create_backend_app)
        self.watcher: Watcher | None = None

        def watched(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            try:
                if self.watcher is not None:
                    self.watcher(environ["REQUEST_METHOD"], environ["PATH_INFO"])
            except HTTPException as refusal:
                return refusal(environ, start_response)
            return application(environ, start_response)

        self._server = make_server(address, 0, watched, threaded=True, request_handler=Quiet)
        self.port = self._server.port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.settings = client_settings(address, self.port)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server, and let this process use it; others need its `settings` in their environment."""
    import fsspec

    store = ObjectStore()
    before = {name: os.environ.get(name) for name in store.settings}
    os.environ.update(store.settings)
    try:
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield store
    finally:
        store.stop()
        fsspec.filesystem("s3").clear_instance_cache()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        # vLLM asks every global of every module for its __dict__, and Flask's raise an error outside of a request.
        for name in [name for name in sys.modules if name.partition(".")[0] in ("flask", "flask_cors", "moto")]:
            del sys.modules[name]


def main() -> None:
    """Serve until killed; print the port."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    store = ObjectStore(parser.parse_args().address)
    import boto3

    endpoint = {"endpoint_url": store.settings["AWS_ENDPOINT_URL"], "region_name": "us-east-1"}
    keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests"}
    boto3.client("s3", **endpoint, **keys).create_bucket(Bucket=BUCKET)
    print(store.port, flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
