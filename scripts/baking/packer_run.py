"""Run Packer: follow its log, stop Packer cleanly on an interrupt, and require IMDSv2 on the builder."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from scripts import aws_session
from scripts.baking.cleanup import builders
from scripts.baking.request import Bake, BakeFailed, BakeRefused

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

CLEANUP_SECONDS = 20
"""Maximum seconds between an interrupt and the end of Packer. After this time, bake.py kills Packer and removes the
builder."""


@dataclass(frozen=True)
class Packer:
    """The Packer on PATH."""

    path: str
    version: tuple[int, ...]

    @property
    def has_plugins(self) -> bool:
        """Whether this is Packer 1.7 or newer, which needs amazon-ebs as a plugin. Older releases of Packer include
        amazon-ebs and refuse the block `required_plugins`."""
        return self.version >= (1, 7)


def find_packer() -> Packer:
    """The Packer on PATH. Raises BakeRefused if HashiCorp's Packer is not on PATH."""
    path = shutil.which("packer")
    if path is None:
        raise BakeRefused(
            "Packer is not installed: run make prepare (Debian's packer is sufficient), or see "
            "https://developer.hashicorp.com/packer"
        )
    said = subprocess.run([path, "version"], check=False, capture_output=True, text=True).stdout
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        raise BakeRefused(f"{path} is not HashiCorp's Packer: `packer version` says {said.strip() or 'nothing'!r}")
    return Packer(path, tuple(int(part) for part in found.groups()))


STORY = (
    (r"Prevalidating|Creating temporary", "create a key pair and a security group for the builder"),
    (r"Launching a source", "start the builder"),
    (r"Waiting for SSH|Using ssh communicator", "wait for the builder's SSH"),
    (r"Connected to SSH", "connected"),
    (r"Provisioning with shell script: \S*/steps/(\w+)\.\w+", "{0}"),
    (r"Uploading \S*/(\S+) =>", "upload {0}"),
    (r"Stopping the source instance|Waiting for the instance to stop", "stop the builder"),
    (r"Creating AMI|Waiting for AMI|AMI: ", "create the image and its snapshot"),
    (r"Terminating the source|Cleaning up|Deleting temporary|Running post-processor", "remove the builder"),
)
"""Pairs of a pattern and a bake step. The first pattern that matches a line of Packer's output gives the step."""


def step_of(line: str) -> str | None:
    """The bake step that this line of Packer's output starts, or None if the line starts no step."""
    for pattern, step in STORY:
        if found := re.search(pattern, line):
            return step.format(*(name.replace("_", " ") for name in found.groups()))
    return None


@contextlib.contextmanager
def interrupted_if_killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Start a helper process. If bake.py is killed during the block, the helper process sends SIGINT to Packer, so that
    Packer removes the builder.

    prctl(PR_SET_PDEATHSIG) would not work, because the kernel would send the signal only to Packer's wrapper process.
    Packer's wrapper process ignores interrupts, because a terminal sends an interrupt to the whole process group.
    """
    waits_for_our_end = 'read -r over || kill -INT "-$1"'
    command = ["/bin/sh", "-c", waits_for_our_end, "sh", str(process.pid)]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watcher.communicate(b"over\n")


def run_packer(
    packer: Packer, arguments: list[str], bake: Bake, environment: dict[str, str], on_line: Callable[[str], None]
) -> None:
    """Run Packer with its output in the log, and call `on_line` for each line. Raises BakeFailed if Packer fails.

    Packer runs in a separate session, so that Ctrl-C reaches Packer only through this process. On an interrupt, this
    process sends SIGINT to Packer's process group, as a terminal does. Then Packer has CLEANUP_SECONDS to remove the
    builder. After CLEANUP_SECONDS, or on a second interrupt, Packer is killed. Packer writes its output to a file. With
    a pipe, Packer would get SIGPIPE if bake.py was killed, and would end before the builder is removed.
    """
    with bake.log.open("ab") as log, bake.log.open(encoding="utf-8", errors="replace") as reader:
        reader.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [packer.path, *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            with interrupted_if_killed(process):
                for line in follow(reader, process):
                    on_line(line)
        except BaseException:
            print(
                "bake: interrupted; Packer removes the builder (press Ctrl-C again to let bake.py remove it)",
                file=sys.stderr,
            )
            with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError, KeyboardInterrupt):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(timeout=CLEANUP_SECONDS)
            raise
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    if status:
        raise BakeFailed(failure(bake.log, arguments[0]))


def follow(log: TextIO, process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield each new line of the log until the process that writes the log has ended."""
    unfinished = ""
    while True:
        ended = process.poll() is not None
        *lines, unfinished = (unfinished + log.read()).split("\n")
        yield from lines
        if ended:
            return
        time.sleep(0.1)


def failure(log: Path, command: str) -> str:
    """The error message: the last lines in the log in which a step or Packer reports an error."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [re.sub(r"^(==>)?\s*amazon-ebs\.mlflow: ?", "", line).rstrip() for line in text.splitlines()]
    telling = [
        line for line in lines if re.search(r"(?i)error|fail|assert_image: \w+:|refus|denied|unable|cannot", line)
    ]
    shown = telling[-12:] or [line for line in lines if line][-12:]
    return f"packer {command} failed; its output is in {log}\n" + "\n".join(f"    {line}" for line in shown)


@contextlib.contextmanager
def require_tokens(ec2: EC2Client, bake: Bake) -> Iterator[None]:
    """During the block, set the metadata service of each new builder to IMDSv2 only.

    Raises BakeFailed if the block succeeded but no builder was set to IMDSv2.
    """
    over = threading.Event()
    held: set[str] = set()
    trouble = ["no builder was seen"]

    def watch() -> None:
        while not over.wait(1.0):
            try:
                for instance in builders(ec2, bake.id):
                    if instance["InstanceId"] not in held and instance["State"]["Name"] in ("pending", "running"):
                        ec2.modify_instance_metadata_options(
                            InstanceId=instance["InstanceId"], HttpTokens="required", HttpPutResponseHopLimit=1
                        )
                        held.add(instance["InstanceId"])
            except aws_session.ERRORS as error:
                trouble.append(aws_session.brief(error))

    watcher = threading.Thread(target=watch, daemon=True, name="imdsv2")
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(timeout=30)
    if not held:
        raise BakeFailed(f"the builder could not be set to IMDSv2 only: {trouble[-1]}")
