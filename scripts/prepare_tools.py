#!/usr/bin/env python3
"""Build the missing tools in build/tools: Pulumi's CLI, a current Packer with its amazon plug-in, and actionlint.

A tool that is on PATH is not built. The other tools are built from their Go modules. `scripts/real_tools/<tool>/go.mod`
pins the version, and go.sum pins the checksum of every module. Existing builds are not repeated. The first build of all
tools takes about ten minutes on one core.

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
    """A tool to build. `name` is the folder of the tool's go.mod, `package` is the tool's Go package, and `stamp` is
    the linker variable for the tool's version."""

    name: str
    package: str
    stamp: str = ""
    vendor: str = ""
    """The vendor's installation command or page, for machines without Go."""


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
    """A tool is missing and cannot be built. The message contains the remedy."""


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
    """Return the tools that are not on PATH and not built from the current go.mod."""
    found = []
    if not elsewhere("pulumi") and not built(PULUMI):
        found.append(PULUMI)
    if not has_current_packer():
        found += [tool for tool in (PACKER, AMAZON) if not built(tool)]
    if not elsewhere("actionlint") and not built(ACTIONLINT):
        found.append(ACTIONLINT)
    return found


def prepare(wanted: list[Tool]) -> None:
    """Build these tools. Raises ToolsMissing if Go is not installed or a build fails."""
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
    """Return the path of the command on PATH. The folder of the tools that this script built is ignored."""
    path = os.pathsep.join(each for each in os.get_exec_path() if Path(each) != BIN)
    return shutil.which(name, path=path)


def has_current_packer() -> bool:
    """Return whether a Packer with plug-in support (1.7 or newer) is on PATH. Debian has Packer 1.6."""
    path = elsewhere("packer")
    if path is None:
        return False
    said = subprocess.run([path, "version"], capture_output=True, text=True).stdout
    version = re.search(r"Packer v(\d+)\.(\d+)", said)
    return version is not None and (int(version[1]), int(version[2])) >= PACKER_WITH_PLUGINS


def built(tool: Tool) -> bool:
    """Return whether build/tools contains this tool, built completely from the current go.mod and go.sum."""
    return (BIN / tool.name).exists() and mark(tool).exists() and mark(tool).read_text() == digest(tool)


def mark(tool: Tool) -> Path:
    """Return the path of the file that contains the hash of a built tool's modules. The file is written last, so that
    an interrupted build is repeated."""
    return BIN / f".{tool.name}"


def digest(tool: Tool) -> str:
    """Return a hash of the tool's pinned modules."""
    folder = MODULES / tool.name
    return hashlib.sha256((folder / "go.mod").read_bytes() + (folder / "go.sum").read_bytes()).hexdigest()


def version(tool: Tool) -> str:
    """Return the version of the tool's own module in go.mod, such as 3.274.1."""
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
    """Install our Python language host beside Pulumi's CLI, because Go module proxies may lack Pulumi's own host.

    Our host runs Pulumi programs with the script `pulumi-language-python-exec` from the Go module of Pulumi's SDK.
    """
    from scripts.rehearsal.pulumi_cli import write_executable

    sdk = run_go(go, PULUMI, "list", "-m", "-f", "{{.Dir}}", "github.com/pulumi/pulumi/sdk/v3")
    executor = BIN / "pulumi-language-python-exec"
    executor.write_bytes((Path(sdk) / "python/cmd/pulumi-language-python-exec").read_bytes())
    executor.chmod(0o755)
    write_executable(BIN / "pulumi-language-python", ["-m", "scripts.rehearsal.language_host", str(executor)])


def install_plugin() -> None:
    """Register the built amazon plug-in in Packer, so that `packer init` finds the plug-in and downloads nothing."""
    PACKER_PLUGINS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [BIN / "packer", "plugins", "install", "--path", BIN / AMAZON.name, "github.com/hashicorp/amazon"],
        env={**os.environ, "PACKER_PLUGIN_PATH": str(PACKER_PLUGINS)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise ToolsMissing(
            f"packer does not accept the amazon plug-in from build/tools: {done.stderr.strip() or done.stdout.strip()}"
        )


def say(text: str) -> None:
    print(f"prepare-tools: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
