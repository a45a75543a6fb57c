"""What libraries print becomes log records."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def printing_as_log(logger: logging.Logger, what: str) -> Iterator[None]:
    """Turn what is printed to stdout inside into records of level INFO, one for each line.

    Args:
        logger: takes them.
        what: stands before each line, such as the library's name.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            if line.strip():
                logger.info("%s: %s", what, line.strip())
