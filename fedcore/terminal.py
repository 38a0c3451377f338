"""How every command talks to its user: a console, and one line for an error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click
import typer
from rich.console import Console

from fedcore.errors import FedcoreError, Refused

__all__ = ["clear_errors", "new_console"]

_NO_READER, _DEFECT = 141, 70  # as shells and sysexits.h have them


def new_console() -> Console:
    """Tables keep their columns whole where the output is no terminal."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=200, markup=False)


@contextmanager
def clear_errors(debug: bool = False) -> Iterator[None]:
    """One line and an exit code for what fedcore raises on purpose: 2 for a wrong request, 1 for a failure on the way."""
    try:
        yield
    except FedcoreError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, Refused) else 1) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os._exit(_NO_READER)  # the reader of our output has left, as in `fedcore runs | head`
        if debug:
            traceback.print_exc()
        print(f"error: {error.filename or 'output'}: {error.strerror}; what was committed is intact", file=sys.stderr)
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        print(f"error: Python package {error.name} is not installed; fedcore doctor says how to get it", file=sys.stderr)
        raise typer.Exit(2) from None
    except click.exceptions.Exit:
        raise
    except Exception as error:  # noqa: BLE001 - a defect of ours: one line, and the way to the traceback
        if debug:
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"error: unexpected {text} (simulate --debug shows where)", file=sys.stderr)
        raise typer.Exit(_DEFECT) from None
