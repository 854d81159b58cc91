#!/usr/bin/env python3
"""Build Pulumi's CLI, a current Packer with its amazon plug-in, and actionlint below build/tools, if not on PATH.

A tool on PATH is used as it is. The others are built from their Go modules: `scripts/real_tools/<tool>/go.mod` pins the
version, go.sum the checksum of every module. Tools that are built already are not built again. A first build takes
about ten minutes of one core.

  prepare_tools.py              build the missing tools; prints the folder to put on PATH
  prepare_tools.py --check      build nothing; exit status 1 if a tool is missing
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - starts this script again with the project's packages

# isort: split
import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.rehearsal.tools import BIN, CHECKOUT, PACKER_PLUGINS

MODULES = CHECKOUT / "scripts/real_tools"
PACKER_WITH_PLUGINS = (1, 7)


@dataclass(frozen=True)
class Tool:
    """A command to build: the folder of its go.mod, its Go package, and the linker's variables for its version."""

    name: str
    package: str
    stamp: str = ""
    vendor: str = ""
    """The vendor's installation, for machines without Go."""


PULUMI = Tool(
    "pulumi",
    "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi",
    "github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=v{version}",
    "curl -fsSL https://get.pulumi.com | sh",
)
PACKER = Tool(
    "packer",
    "github.com/hashicorp/packer",
    vendor="see https://developer.hashicorp.com/packer/install (1.7 or newer)",
)
AMAZON = Tool("packer-plugin-amazon", "github.com/hashicorp/packer-plugin-amazon", vendor="packer init packer")
ACTIONLINT = Tool(
    "actionlint",
    "github.com/rhysd/actionlint/cmd/actionlint",
    vendor="see https://github.com/rhysd/actionlint/releases",
)


class ToolsMissing(Exception):
    """A tool is missing and cannot be built; the message contains the remedy."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="build nothing; print the missing tools")
    arguments = parser.parse_args()
    wanted = missing()
    if arguments.check:
        for tool in wanted:
            say(f"{tool.name} is missing: run `make prepare-tools`")
        return 1 if wanted else 0
    try:
        prepare(wanted)
    except ToolsMissing as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    print(BIN)
    return 0


def missing() -> list[Tool]:
    """The tools that are neither on PATH nor built from the current go.mod."""
    found = []
    if not elsewhere("pulumi") and not built(PULUMI):
        found.append(PULUMI)
    if not has_current_packer():
        found += [tool for tool in (PACKER, AMAZON) if not built(tool)]
    if not elsewhere("actionlint") and not built(ACTIONLINT):
        found.append(ACTIONLINT)
    return found


def prepare(wanted: list[Tool]) -> None:
    """Build these tools. Raises ToolsMissing without Go, or if a module cannot be downloaded."""
    go = shutil.which("go")
    if wanted and go is None:
        remedies = "".join(f"\n  {tool.name}: {tool.vendor}" for tool in wanted)
        raise ToolsMissing(f"Go is not installed, so nothing can be built. Install Go 1.26 or newer, or:{remedies}")
    BIN.mkdir(parents=True, exist_ok=True)
    for tool in wanted:
        build(tool, str(go))
        if tool is PULUMI:
            install_language_host(str(go))
        if tool is AMAZON:
            install_plugin()
        mark(tool).write_text(digest(tool))
    say("ready" if wanted else "ready: nothing to build")


def elsewhere(name: str) -> str | None:
    """The command on PATH, unless this script built it."""
    path = os.pathsep.join(each for each in os.get_exec_path() if Path(each) != BIN)
    return shutil.which(name, path=path)


def has_current_packer() -> bool:
    """Whether a Packer with plug-ins is on PATH; Debian's 1.6 has none."""
    path = elsewhere("packer")
    if path is None:
        return False
    said = subprocess.run([path, "version"], capture_output=True, text=True).stdout
    version = re.search(r"Packer v(\d+)\.(\d+)", said)
    return version is not None and (int(version[1]), int(version[2])) >= PACKER_WITH_PLUGINS


def built(tool: Tool) -> bool:
    """Whether build/tools has this tool and its other files, built from the current go.mod and go.sum."""
    return (BIN / tool.name).exists() and mark(tool).exists() and mark(tool).read_text() == digest(tool)


def mark(tool: Tool) -> Path:
    """The file with the hash of the modules that the tool was built from; it is written last, so an interrupted build
    is repeated."""
    return BIN / f".{tool.name}"


def digest(tool: Tool) -> str:
    """Hash of the pinned modules."""
    folder = MODULES / tool.name
    return hashlib.sha256((folder / "go.mod").read_bytes() + (folder / "go.sum").read_bytes()).hexdigest()


def version(tool: Tool) -> str:
    """The version of the tool's own module that go.mod requires, such as 3.274.1."""
    module = tool.package.removesuffix(f"/cmd/{tool.name}")
    text = (MODULES / tool.name / "go.mod").read_text()
    found = re.search(rf"^(?:require)?\s*{re.escape(module)} v(\S+)", text, re.MULTILINE)
    assert found, f"scripts/real_tools/{tool.name}/go.mod does not require {module}"
    return found[1]


def build(tool: Tool, go: str) -> None:
    say(f"building {tool.name} {version(tool)} from its Go module; the first time takes some minutes")
    flags = "-s -w" + (f" -X {tool.stamp.format(version=version(tool))}" if tool.stamp else "")
    run_go(
        go, tool, "build", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", str(BIN / tool.name), tool.package
    )


def run_go(go: str, tool: Tool, *arguments: str) -> str:
    done = subprocess.run([go, *arguments], cwd=MODULES / tool.name, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"go ended with {done.returncode}"]
        raise ToolsMissing(f"{tool.name} could not be built: {said[-1]}. Its vendor's way: {tool.vendor}")
    return done.stdout.strip()


def install_language_host(go: str) -> None:
    """Install the rehearsal's Python language host beside the CLI; Pulumi's is a Go module that proxies may not serve.

    The script that runs the program is Pulumi's own, from the Go module of its SDK.
    """
    from scripts.rehearsal.pulumi_cli import write_executable

    sdk = run_go(go, PULUMI, "list", "-m", "-f", "{{.Dir}}", "github.com/pulumi/pulumi/sdk/v3")
    executor = BIN / "pulumi-language-python-exec"
    executor.write_bytes((Path(sdk) / "python/cmd/pulumi-language-python-exec").read_bytes())
    executor.chmod(0o755)
    write_executable(BIN / "pulumi-language-python", ["-m", "scripts.rehearsal.language_host", str(executor)])


def install_plugin() -> None:
    """Register the built plug-in, so that `packer init` finds it and downloads nothing."""
    PACKER_PLUGINS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [BIN / "packer", "plugins", "install", "--path", BIN / AMAZON.name, "github.com/hashicorp/amazon"],
        env={**os.environ, "PACKER_PLUGIN_PATH": str(PACKER_PLUGINS)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise ToolsMissing(
            f"packer does not accept the plug-in that was built: {done.stderr.strip() or done.stdout.strip()}"
        )


def say(text: str) -> None:
    print(f"prepare-tools: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
