"""The command line."""

from polyshard.cli.app import main

__all__ = ["main"]
