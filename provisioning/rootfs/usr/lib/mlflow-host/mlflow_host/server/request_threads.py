"""Threads for blocking calls from the event loop: MLflow's Flask application, SQL and S3.

asyncio's run_in_executor also uses threads, but creates two futures, a lock and several callbacks for each call. A
call through run_in_executor uses 1.4 times as much processor time as a call through this module (`python -m
tests.bench.handover`).
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class RequestThreads:
    """A pool of at most `most` threads. A thread is started only when a call needs it. If all threads are busy, calls
    wait in order.

    When the process ends, it does not wait for these threads, because uvicorn has already waited for all requests, and
    each request waits for its calls.
    """

    def __init__(self, most: int, name: str) -> None:
        self.most = most
        self._name = name
        self._calls: SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Future[Any], Any, Any]] = SimpleQueue()
        self._threads = 0
        self._unfinished = 0
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Return the number of calls that wait for a thread."""
        return self._calls.qsize()

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in one of the threads and return its result. Raises the function's exceptions. Raises
        RuntimeError if there is not enough memory for the first thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        with self._lock:
            self._unfinished += 1
            needs_thread = self._unfinished > self._threads < self.most
        try:
            if needs_thread:
                self._start_thread()
            self._calls.put((loop, done, function, arguments))
        except BaseException:
            self._finish()
            raise
        return await done

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        except RuntimeError:
            if not self._threads:
                raise
        else:
            with self._lock:
                self._threads += 1

    def _work(self) -> None:
        while True:
            try:
                # A variable for the arguments would keep a request's body in memory until the next call.
                self._answer(*self._calls.get())
            except BaseException as error:
                print(f"mlflow-host: the result of a call is lost: {error!r}", file=sys.stderr, flush=True)

    def _answer(
        self, loop: asyncio.AbstractEventLoop, done: asyncio.Future[Any], function: Callable[..., Any], arguments: Any
    ) -> None:
        result, raised = None, None
        try:
            result = function(*arguments)
        except BaseException as error:
            raised = error
        self._finish()
        with suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(_settle, done, result, raised)

    def _finish(self) -> None:
        with self._lock:
            self._unfinished -= 1


def _settle(done: asyncio.Future[Any], result: Any, raised: BaseException | None) -> None:
    if done.done():  # the request was cancelled
        return
    if raised is None:
        done.set_result(result)
    else:
        done.set_exception(raised)
