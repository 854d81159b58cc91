"""Read values from the terminal or from standard input."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path


class NoAnswer(Exception):
    """No value was entered; the text names another way to give it."""


def ask_secret(name: str, instead: str) -> str:
    """Read a value from the terminal without showing it. Without a terminal, raises NoAnswer with the remedy
    `instead`."""
    try:
        Path("/dev/tty").open().close()
        return getpass.getpass(f"{name}: ")
    except OSError:
        raise NoAnswer(f"there is no terminal to ask for {name}: {instead}") from None
    except EOFError:
        raise NoAnswer(f"{name} was not given: {instead}") from None


def read_line(name: str) -> str:
    """A line of standard input without its line end. Raises NoAnswer if there is none or it is not text."""
    try:
        line = sys.stdin.readline() if sys.stdin else ""
    except (OSError, ValueError):
        raise NoAnswer(f"{name} is read from standard input, which is not text") from None
    if not line:
        raise NoAnswer(f"{name} is read from standard input, which is empty: give it one line") from None
    return line.rstrip("\n")


def confirmed(question: str) -> bool:
    """Whether the user types yes at a terminal."""
    if not sys.stdin or not sys.stdin.isatty():
        return False
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() == "yes"


def stdin_is_terminal() -> bool:
    return bool(sys.stdin and sys.stdin.isatty())
