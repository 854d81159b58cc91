"""In the thread pool for a server process's requests, each call returns exactly once, and a new thread starts only if
no thread is idle."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest

from mlflow_host.server.request_threads import RequestThreads


def test_calls_return_and_raise_what_their_functions_do() -> None:
    async def both() -> tuple[int, str]:
        threads = RequestThreads(2, "request")
        with pytest.raises(ZeroDivisionError):
            await threads.call(lambda: 1 // 0)
        return await threads.call(int, "5"), await threads.call(lambda: threading.current_thread().name)

    assert asyncio.run(both()) == (5, "request-0")


def test_at_most_that_many_run_at_once_and_the_others_wait_in_order() -> None:
    running, most, begun = 0, 0, []
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            begun.append(number)
        time.sleep(0.02)
        with lock:
            running -= 1
        return number

    async def all_of_them() -> list[int]:
        threads = RequestThreads(3, "request")
        tasks = [asyncio.create_task(threads.call(work, number)) for number in range(12)]
        await asyncio.sleep(0.01)
        assert threads.waiting == 9
        return await asyncio.gather(*tasks)

    assert asyncio.run(all_of_them()) == [*range(12)]
    assert most == 3 and sorted(begun[:3]) == [0, 1, 2] and begun[3:] == sorted(begun[3:])


def test_idle_thread_is_used_again() -> None:
    async def names() -> set[str]:
        threads = RequestThreads(8, "request")
        return {await threads.call(lambda: threading.current_thread().name) for _ in range(20)}

    assert asyncio.run(names()) == {"request-0"}


def test_cancelled_request_leaves_its_thread_usable() -> None:
    async def cancelled() -> str:
        threads = RequestThreads(1, "request")
        task = asyncio.create_task(threads.call(time.sleep, 0.05))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await threads.call(lambda: "answered")

    assert asyncio.run(cancelled()) == "answered"


def test_without_memory_for_another_thread_the_call_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    async def two() -> list[int]:
        threads = RequestThreads(2, "request")
        await threads.call(int)

        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        try:
            return [*await asyncio.gather(threads.call(int, "1"), threads.call(int, "2"))]
        finally:
            monkeypatch.setattr(threading.Thread, "start", real)

    assert asyncio.run(two()) == [1, 2]


def test_without_memory_for_the_first_thread_the_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def one() -> None:
        threads = RequestThreads(1, "request")
        monkeypatch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no thread")))
        try:
            with pytest.raises(RuntimeError, match="no thread"):
                await threads.call(int)
        finally:
            monkeypatch.undo()
        assert await threads.call(int) == 0

    asyncio.run(one())


def test_body_of_a_request_is_freed_when_it_is_answered() -> None:
    class Body:
        pass

    async def answered() -> weakref.ref[Body]:
        threads, body = RequestThreads(1, "request"), Body()
        await threads.call(id, body)
        return weakref.ref(body)

    found = asyncio.run(answered())
    gc.collect()
    assert found() is None
