"""Ctrl-C and its relatives: what a script must finish it finishes, and whatever ends it lets it clean up first."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What ends a script beside Ctrl-C: a service manager, a closed terminal."""


def end_like_ctrl_c() -> None:
    """From now on whatever ends this process raises KeyboardInterrupt in it, as Ctrl-C does."""
    for number in ENDING:
        signal.signal(number, _interrupt)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Nothing interrupts the block: it removes what would cost money or stay behind."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *ENDING)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def exit_with(
    main: Callable[[], int], say: Callable[[str], None], refusals: tuple[type[BaseException], ...] = ()
) -> NoReturn:
    """End this process with what `main` returns; with 2 and the sentence of a refusal; with 130 when interrupted."""
    end_like_ctrl_c()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except refusals as refusal:
        say(str(refusal))
        sys.exit(2)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
