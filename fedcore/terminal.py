"""How every command talks to its user: a console, and one line for an error."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from fedcore.errors import FedcoreError, Refused

__all__ = ["Commands", "clear_errors", "new_console", "printable"]

_NO_READER, _DEFECT, _WRONG_USE = 141, 70, 2  # as shells, sysexits.h and click have them


class Commands(TyperGroup):
    """The root of a command line on which a wrong or missing option or argument is one line, of any command below it."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """As click has it, but for errors."""
        with _one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """As click has it, but for errors."""
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # shows the help
        raise
    except click.UsageError as error:
        place = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        print(f"error: {_wording(error)}{place}", file=sys.stderr)
        raise typer.Exit(_WRONG_USE) from None


def _wording(error: click.UsageError) -> str:
    """What click says, with the nearest name where it knows one."""
    if isinstance(error, click.NoSuchOption):
        nearest = f" (did you mean {error.possibilities[0]}?)" if error.possibilities else ""
        return f"no such option {error.option_name}{nearest}"
    said = " ".join(error.format_message().split()).rstrip(".")
    said = re.sub(r"\. Did you mean (.*)\?$", r" (did you mean \1?)", said)
    return said[:1].lower() + said[1:]


def new_console() -> Console:
    """Tables keep their columns whole where the output is no terminal."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=200, markup=False)


def printable(words: object) -> str:
    """Without control characters: errors quote files of unknown origin, devices say what they like, and a terminal obeys."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(words))


@contextmanager
def clear_errors(debug: bool = False) -> Iterator[None]:
    """One line and an exit code for what fedcore raises on purpose: 2 for a wrong request, 1 for a failure on the way."""
    try:
        yield
    except FedcoreError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {printable(error)}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, Refused) else 1) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os._exit(_NO_READER)  # the reader of our output has left, as in `fedcore runs | head`
        if debug:
            traceback.print_exc()
        print(
            f"error: {error.filename or 'output'}: {printable(error.strerror or error)}; what was committed is intact",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        print(f"error: Python package {error.name} is not installed; fedcore doctor says how to get it", file=sys.stderr)
        raise typer.Exit(2) from None
    except click.exceptions.Exit:
        raise
    except Exception as error:  # noqa: BLE001 - a defect of ours: one line, and the way to the traceback
        if debug:
            traceback.print_exc()
        text = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        print(f"error: unexpected {text} (simulate --debug shows where)", file=sys.stderr)
        raise typer.Exit(_DEFECT) from None
