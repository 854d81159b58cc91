"""Run a Pulumi program in this process with our own engine, in place of Pulumi's language host.

A subclass of pulumi.runtime's MockMonitor receives the raw requests (options, dependencies, secret marks) and passes
the requests to the engine.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pulumi
from google.protobuf import empty_pb2
from pulumi.runtime import mocks, settings, stack
from pulumi.runtime.proto import provider_pb2, resource_pb2

from scripts.rehearsal.advice import for_rehearsal
from scripts.rehearsal.engine import Engine
from scripts.rehearsal.errors import ApplyError, Interrupted, RehearsalError
from scripts.rehearsal.wire import Props, from_wire, reveal, to_wire

Lookup = Callable[[Any, Props], Props]


class LookupFailed(ValueError):
    """A data source found no result or too many results. The error has the same message as in the AWS provider."""


class ProgramError(RehearsalError):
    """The Pulumi program rejected its settings or failed. The error's message comes from the program."""


class Monitor(mocks.MockMonitor):
    """Receives a program's requests in place of Pulumi's engine."""

    def __init__(self, engine: Engine, lookups: Mapping[str, Lookup]) -> None:
        super().__init__(_NoMocks())
        self.engine = engine
        self.lookups = lookups

    def RegisterResource(self, request: Any) -> Any:
        urn = self.make_urn(request.parent, request.type, request.name)
        return self.engine.register(request, urn)

    def RegisterResourceOutputs(self, request: Any) -> Any:
        if request.urn.split("::")[2] == "pulumi:pulumi:Stack":
            self.engine.outputs = from_wire(request.outputs)
        return empty_pb2.Empty()

    def RegisterResourceHook(self, request: Any) -> Any:
        self.engine.hooks.register(request)
        return empty_pb2.Empty()

    def ReadResource(self, request: Any) -> Any:
        kind = self.engine.kinds.get(request.type)
        found = kind.read(self.engine.aws, request.id, reveal(from_wire(request.properties))) if kind else None
        if found is None:
            raise ApplyError(f"{request.type} {request.name}: there is no {request.id}")
        urn = self.make_urn(request.parent, request.type, request.name)
        return resource_pb2.ReadResourceResponse(urn=urn, properties=to_wire(found))

    def Invoke(self, request: Any) -> Any:
        # An error must be returned, not raised. A raised exception would end the run even if the program catches it.
        try:
            if request.tok not in self.lookups:
                raise LookupFailed("the rehearsal lacks this data source: add it to scripts/rehearsal/data_sources.py")
            found = self.lookups[request.tok](self.engine.aws, reveal(from_wire(request.args)))
        except Exception as error:
            failure = provider_pb2.CheckFailure(property="", reason=str(error))
            return resource_pb2.ResourceInvokeResponse(failures=[failure])
        return resource_pb2.ResourceInvokeResponse(**{"return": to_wire(found)})


class _NoMocks(mocks.Mocks):
    """An object that MockMonitor's constructor requires. Monitor handles all requests without this object."""

    def call(self, args: mocks.MockCallArgs) -> Any:
        raise NotImplementedError(args.token)

    def new_resource(self, args: mocks.MockResourceArgs) -> Any:
        raise NotImplementedError(args.typ)


def run(
    program: Path | Callable[[], None],
    engine: Engine,
    lookups: Mapping[str, Lookup],
    *,
    project: str,
    stack_name: str,
    config: Mapping[str, str],
    secret_keys: list[str],
    on_log: Callable[[str], None],
) -> None:
    """Run the program and store its outputs in `engine.outputs`.

    `program` is a folder with a __main__.py or, for tests, a function. `config` maps full keys (`project:name`) to
    text. Raises ProgramError with the program's message if the program refused its settings, ApplyError if a resource
    failed, and Interrupted if the engine was cancelled.
    """
    logger = logging.Logger("program")
    logger.addHandler(_Forward(on_log))
    monitor = Monitor(engine, lookups)

    info = monitor.GetDeploymentInfo(empty_pb2.Empty())  # type: ignore[no-untyped-call]
    features = set(info.supportedFeatures)

    def body() -> None:
        configured = mocks.MockSettings(  # type: ignore[no-untyped-call]
            monitor=monitor,
            monitor_features=features,
            engine=mocks.MockEngine(logger),
            project=project,
            stack=stack_name,
            dry_run=engine.dry_run,
            organization="organization",
            root_directory=str(program) if isinstance(program, Path) else str(Path.cwd()),
            callbacks=None,
            lock=settings.SETTINGS.lock,
            outputs=set(),
            package_refs={},
            base_providers_by_ref={},
            legacy_apply_enabled=False,
        )
        settings.configure(configured)
        settings.set_root_resource(None)  # type: ignore[arg-type]  # remove the stack of an earlier run
        pulumi.runtime.set_all_config(dict(config), secret_keys)
        if isinstance(program, Path):
            with _as_program(program):
                asyncio.run(_in_stack(lambda: _run_file(program)))
        else:
            asyncio.run(_in_stack(program))

    try:
        contextvars.copy_context().run(body)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise ProgramError(for_rehearsal(str(stop.code))) from None
    except BaseException as error:
        if engine.failure is not None:
            raise engine.failure from None
        if isinstance(error, (ApplyError, Interrupted, KeyboardInterrupt)):
            raise
        raise ProgramError(for_rehearsal(sentence(error))) from error


async def _in_stack(body: Callable[[], None]) -> None:
    """Run `body` in a stack. If a resource fails, raise its error. asyncio logs no messages about the tasks that depend
    on the failed resource."""
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    await stack.run_in_stack(body)


def sentence(error: BaseException) -> str:
    """Return the text of a program's error. The text of an unexpected error begins with the exception's name."""
    if isinstance(error, pulumi.RunError) or type(error) is Exception:
        return str(error)
    return f"{type(error).__name__}: {error}"


def _run_file(program: Path) -> None:
    runpy.run_path(str(program), run_name="__main__")


@contextmanager
def _as_program(folder: Path) -> Any:
    """Set sys.path and the working directory like Pulumi's language host. After the block, unload the folder's
    modules."""
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            origin = getattr(module, "__file__", None)
            if origin and Path(origin).is_relative_to(folder) and name != "__main__":
                del sys.modules[name]


class _Forward(logging.Handler):
    """Log handler that passes the program's log messages to `on_log`."""

    def __init__(self, on_log: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.on_log = on_log

    def emit(self, record: logging.LogRecord) -> None:
        self.on_log(for_rehearsal(record.getMessage()))
