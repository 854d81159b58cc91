"""Ctrl-C, SIGTERM and SIGHUP: let a script clean up, and finish the steps that must not be interrupted."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from scripts import invoker

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a script besides Ctrl-C: from a service manager, from a closed terminal."""


def end_like_ctrl_c() -> None:
    """Make these signals raise KeyboardInterrupt in this process, like Ctrl-C."""
    for number in ENDING:
        signal.signal(number, _interrupt)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore interrupts during the block, which removes resources that would otherwise be left behind or cost money."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *ENDING)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def passed_on(process: subprocess.Popen[Any], finish: Callable[[], object]) -> Iterator[None]:
    """If the block is interrupted or fails, send the program SIGINT and call `finish`, which waits for its end.

    For a program in a session of its own, so that it gets Ctrl-C only once, from this process.
    """
    try:
        yield
    except BaseException:
        with uninterrupted():
            process.send_signal(signal.SIGINT)
            finish()
        raise


def exit_with(
    main: Callable[[], int], say: Callable[[str], None], refusals: tuple[type[BaseException], ...] = ()
) -> NoReturn:
    """End this process with the result of `main`; with 2 and the sentence of a refusal; with 130 when interrupted."""
    end_like_ctrl_c()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except refusals as refusal:
        say(str(refusal))
        sys.exit(2)
    finally:
        invoker.give_back(Path(__file__).parents[1])


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
