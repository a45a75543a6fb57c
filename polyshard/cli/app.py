"""The `polyshard` command; each subcommand has its own file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from polyshard import __version__
from polyshard.cli.convert import convert
from polyshard.cli.doctor import doctor
from polyshard.cli.plan import plan
from polyshard.cli.serve import serve
from polyshard.cli.verify import verify
from polyshard.core.errors import PolyshardError

app = typer.Typer(
    name="polyshard",
    help="Write a decoder once; train it on any parallelism library, serve it in an unpatched vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"polyshard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version  # its callback has printed it


app.command()(doctor)
app.command()(verify)
app.command()(convert)
app.command()(plan)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def main() -> None:
    """Run the command line; a user error prints one line instead of a traceback.

    Examples:
        >>> import sys
        >>> sys.argv = ["polyshard", "--version"]
        >>> main()
        Traceback (most recent call last):
        SystemExit: 0
    """
    try:
        app()
    except PolyshardError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)
