"""Handling of Ctrl-C, SIGTERM and SIGHUP: an interrupted script cleans up, and some steps cannot be interrupted."""

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
"""Signals that have the same effect as Ctrl-C. A service manager sends SIGTERM, a closed terminal sends SIGHUP."""


def end_like_ctrl_c() -> None:
    """Make the signals in `ENDING` raise KeyboardInterrupt in this process, like Ctrl-C."""
    for number in ENDING:
        signal.signal(number, _interrupt)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore interrupts during the block, so that a cleanup is completed and leaves no resources that cost money."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *ENDING)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def passed_on(process: subprocess.Popen[Any], finish: Callable[[], object]) -> Iterator[None]:
    """If the block is interrupted or fails, send SIGINT to the program, and call `finish`, which waits until the
    program has ended.

    The program must run in its own session, so that only this process and not the terminal sends SIGINT to the program.
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
    """Call `main`, and exit with the returned status. The exit status is 2 after an exception of a type in `refusals`,
    and 130 after an interrupt."""
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
