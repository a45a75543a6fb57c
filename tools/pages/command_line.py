"""The command line, from the commands' own help."""

from typing import Any

import click
import typer

from polyshard.cli.app import app
from tools.pages.tables import markdown


def page() -> str:
    command: Any = typer.main.get_command(app)
    lines = ["# Command line\n", f"{command.help}\n"]
    for name, sub in command.commands.items():
        context = click.Context(sub, info_name=f"polyshard {name}")
        usage = " ".join(piece.strip("{}").upper() for piece in sub.collect_usage_pieces(context))
        lines += [f"## polyshard {name}\n", f"```\npolyshard {name} {usage}\n```\n", _paragraphs(sub.help or "")]
        arguments = [p for p in sub.params if isinstance(p, click.Argument) or p.param_type_name == "argument"]
        options = [p for p in sub.params if p not in arguments]
        if arguments:
            lines.append(markdown(("argument", "meaning"), ((f"`{p.name.upper()}`", _help(p)) for p in arguments)))
        if options:
            lines.append(markdown(("option", "default", "meaning"), (_option(p) for p in options)))
    return "\n".join(lines).rstrip() + "\n"


def _paragraphs(text: str) -> str:
    return text.replace("\f", "").replace("\b", "").strip() + "\n"


def _help(parameter: Any) -> str:
    return " ".join((getattr(parameter, "help", None) or "").split())


def _option(parameter: Any) -> tuple[str, str, str]:
    names = " / ".join((*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    shown = (
        "" if default is None or callable(default) or default in ((), []) else f"`{getattr(default, 'value', default)}`"
    )
    return f"`{names}`", shown, _help(parameter)
