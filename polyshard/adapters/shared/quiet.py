"""Redirection of libraries' printed output to log records."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def printing_as_log(logger: logging.Logger, what: str) -> Iterator[None]:
    """Log each line printed to stdout within the block at level INFO.

    Args:
        logger: logger that receives the records.
        what: prefix of each record, such as the library's name.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            if line.strip():
                logger.info("%s: %s", what, line.strip())
