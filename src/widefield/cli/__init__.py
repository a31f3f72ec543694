"""The command line: one module a verb, with a function of that name or, for sub-verbs, an `app`.

Verb modules import nothing heavy at the top, so that `widefield --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from widefield.cli._common import Interrupted
from widefield.errors import WidefieldError

__all__ = ["build", "main", "run"]

VERBS = ("demo", "eval", "bench", "calibrate", "generate", "info", "convert", "tune", "train")
"""Verbs in the order of the help page. One whose module is missing is left out."""

INTERRUPTED = 130
BAD_INPUT = 2


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"widefield {version('widefield')}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Longer contexts for live Mamba models: LongMamba, DeciMamba and their bench.

    Begin with `widefield demo`.
    """


def build() -> typer.Typer:
    """The application with every verb whose module exists."""
    app = typer.Typer(
        name="widefield",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for verb in VERBS:
        name = f"widefield.cli.{verb}"
        if importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb)
        else:
            app.command(verb)(getattr(module, verb))
    return app


def run(args: Sequence[str]) -> int:
    """Run one command line.

    Args:
        args: the arguments after the program's name.

    Returns:
        The exit code: 0; 2 for bad input, which is told on one line of stderr; 130 after Ctrl-C.
    """
    try:
        code = build()(list(args), standalone_mode=False, prog_name="widefield")
    except Interrupted as interrupt:
        return _interrupted(str(interrupt))
    except WidefieldError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader of our output has gone; the final flush must not complain about that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _known_failure(error, args)
        if message is None:
            raise
        return _fail(message) if message else BAD_INPUT
    if code == INTERRUPTED:
        return _interrupted("nothing was left half-written")
    return code if isinstance(code, int) else 0


def main() -> None:
    """The console script `widefield`."""
    sys.exit(run(sys.argv[1:]))


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _interrupted(line: str) -> int:
    print(f"interrupted: {line}", file=sys.stderr)
    return INTERRUPTED


def _known_failure(error: Exception, args: Sequence[str]) -> str | None:
    """One line for failures that are the user's or the machine's, None for our own bugs."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _usage(error, args)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: use smaller batches, shorter lengths, or another --device"
    return None


def _usage(error: Any, args: Sequence[str]) -> str:
    """A parser's complaint in our own form, with the nearest name and where the help is."""
    context = getattr(error, "ctx", None)
    kind = type(error).__name__
    text = str(error.format_message()).strip()
    if context is None:
        return text
    if kind == "NoArgsIsHelpError":
        print(context.get_help(), file=sys.stderr)
        return ""
    if kind == "NoSuchOption":
        options = [name for p in context.command.params for name in p.opts + p.secondary_opts]
        text = f"unknown option {error.option_name}{_nearest(error.option_name, options)}"
    elif text.startswith("No such command"):
        verb = next(word for word in args if repr(word) in text)
        text = f"unknown command {verb}{_nearest(verb, context.command.commands)}"
    elif (value := _given(error, args)) and repr(value) not in text:
        text = text.replace("Invalid value for", f"Invalid value {value!r} for")
    text = text[:1].lower() + text[1:]
    return f"{text.rstrip('.')} (see {context.command_path} --help)"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else ""


def _given(error: Any, args: Sequence[str]) -> str:
    """What the user gave for the option that an error is about; empty if that cannot be told."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for word, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else following
    return ""
