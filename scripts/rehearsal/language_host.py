"""Python language host for Pulumi's engine, used only with a CLI that was built by scripts/prepare_tools.py.

Pulumi's own distribution includes the language host `pulumi-language-python`. A build of the CLI from its Go module
does not include `pulumi-language-python`. This module implements the part of pulumirpc.LanguageRuntime that preview,
up, refresh and destroy call. Pulumi's own `pulumi-language-python-exec`, from the Go module of Pulumi's SDK, runs the
program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from google.protobuf import empty_pb2
from pulumi.runtime.proto import language_pb2, language_pb2_grpc, plugin_pb2

from scripts.rehearsal.plugin_server import serve
from scripts.rehearsal.plugin_versions import provider_versions

TOLD = 32
"""Exit status of pulumi-language-python-exec if it has already printed the error."""


def end(program: subprocess.Popen[bytes]) -> None:
    """Terminate the program if it is running."""
    if program.poll() is None:
        program.terminate()


class Host(language_pb2_grpc.LanguageRuntimeServicer):
    """Runs Python programs. This object owns the processes that it started."""

    def __init__(self, engine: str, executor: Path) -> None:
        """`engine` is the engine's address, and `executor` is the path of pulumi-language-python-exec."""
        self.engine = engine
        self.executor = executor
        self.running: list[subprocess.Popen[bytes]] = []

    def Handshake(self, request: Any, context: Any) -> Any:
        return language_pb2.LanguageHandshakeResponse()

    def GetPluginInfo(self, request: Any, context: Any) -> Any:
        return plugin_pb2.PluginInfo(version=metadata.version("pulumi"))

    def GetRequiredPackages(self, request: Any, context: Any) -> Any:
        return language_pb2.GetRequiredPackagesResponse(
            packages=[
                plugin_pb2.PackageDependency(kind="resource", name=name, version=f"v{version}")
                for name, version in provider_versions().items()
            ]
        )

    def GetProgramDependencies(self, request: Any, context: Any) -> Any:
        return language_pb2.GetProgramDependenciesResponse(
            dependencies=[
                language_pb2.DependencyInfo(name=each.name, version=each.version)
                for each in metadata.distributions()
                if each.name.startswith("pulumi")
            ]
        )

    def About(self, request: Any, context: Any) -> Any:
        return language_pb2.AboutResponse(executable=sys.executable, version=sys.version.split()[0])

    def RuntimeOptionsPrompts(self, request: Any, context: Any) -> Any:
        return language_pb2.RuntimeOptionsResponse()

    def Run(self, request: Any, context: Any) -> Any:
        arguments = {
            "monitor": request.monitor_address,
            "engine": self.engine,
            "project": request.project,
            "root_directory": request.info.root_directory,
            "stack": request.stack,
            "pwd": request.pwd,
            "dry_run": str(request.dryRun).lower(),
            "parallel": str(request.parallel),
            "organization": request.organization,
        }
        options = [part for name, value in arguments.items() if value for part in (f"--{name}", value)]
        # The configuration contains secret values, so it is passed in the environment, not on the command line.
        config = {
            "PULUMI_CONFIG": json.dumps(dict(request.config)),
            "PULUMI_CONFIG_SECRET_KEYS": json.dumps(list(request.configSecretKeys)),
        }
        program = subprocess.Popen(
            [sys.executable, "-u", str(self.executor), *options, request.info.entry_point or ".", *request.args],
            cwd=request.pwd or request.info.program_directory,
            env={**os.environ, **config},
            stdin=subprocess.DEVNULL,
        )
        self.running.append(program)
        context.add_callback(lambda: end(program))
        status = program.wait()
        self.running.remove(program)
        if status == TOLD:
            return language_pb2.RunResponse(bail=True)
        return language_pb2.RunResponse(error=f"program exited with non-zero exit code: {status}" if status else "")

    def Cancel(self, request: Any, context: Any) -> Any:
        for program in list(self.running):
            program.terminate()
        return empty_pb2.Empty()


def main() -> None:
    """Usage: language_host.py EXECUTOR [OPTIONS] ENGINE_ADDRESS. The engine's options are ignored."""
    host = Host(sys.argv[-1], Path(sys.argv[1]))
    serve(host, language_pb2_grpc.add_LanguageRuntimeServicer_to_server)


if __name__ == "__main__":
    main()
