"""Read values from the terminal or from standard input."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path


class NoAnswer(Exception):
    """The user entered no value. The error's message contains the remedy."""


def ask_secret(name: str, instead: str) -> str:
    """Read a value from the terminal without showing the input. If there is no terminal, raises NoAnswer with the
    remedy `instead`."""
    try:
        Path("/dev/tty").open().close()
        return getpass.getpass(f"{name}: ")
    except OSError:
        raise NoAnswer(f"there is no terminal to ask for {name}: {instead}") from None
    except EOFError:
        raise NoAnswer(f"{name} was not given: {instead}") from None


def read_line(name: str) -> str:
    """Return one line of standard input without the line end. Raises NoAnswer if the input is empty or is not text."""
    try:
        line = sys.stdin.readline() if sys.stdin else ""
    except (OSError, ValueError):
        raise NoAnswer(f"{name} is read from standard input, which is not text") from None
    if not line:
        raise NoAnswer(f"{name} is read from standard input, which is empty: give it one line") from None
    return line.rstrip("\n")


def confirmed(question: str) -> bool:
    """Return whether the user answers the question with yes. Without a terminal, return False."""
    if not sys.stdin or not sys.stdin.isatty():
        return False
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() == "yes"


def stdin_is_terminal() -> bool:
    return bool(sys.stdin and sys.stdin.isatty())
