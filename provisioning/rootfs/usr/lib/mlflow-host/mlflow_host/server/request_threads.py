"""Threads in which the event loop calls what blocks: MLflow's Flask application, SQL, S3.

asyncio's run_in_executor does the same. Per call it makes two futures, a lock and several callbacks, which takes 1.4
times the processor time of the handover here (`python -m tests.bench.handover`).
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
    """At most `most` threads, started when they are first needed. Calls beyond that wait in order.

    The process does not wait for them at its end: uvicorn waits for requests, which wait for their calls.
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
        """Calls that wait for a thread."""
        return self._calls.qsize()

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The result of a function, called in one of the threads. Raises what it raises, and RuntimeError if there is
        no memory for the first thread."""
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
                # No variable here keeps a request's body until the next call.
                self._answer(*self._calls.get())
            except BaseException as error:
                print(f"mlflow-host: a result is lost: {error!r}", file=sys.stderr, flush=True)

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
