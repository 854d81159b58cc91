#!/usr/bin/env python3
"""Bakes the machine image: source image in, AMI out.

The builder is an ordinary instance that Packer starts, provisions over SSH and turns into an image. Nothing of it stays
behind, whichever way the bake ends.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import boto3
import images
import lock
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.parsers import ResponseParserError
from interrupts import end_like_ctrl_c, uninterrupted

REPOSITORY = Path(__file__).resolve().parent.parent
BUILDS = REPOSITORY / "build" / "bake"
DEFAULT_REGION = "eu-central-1"
KEPT_BUILDS = 10
CLEANUP_SECONDS = 20
"""How long Packer may take to remove the builder after an interrupt, before bake.py removes it itself."""

SOURCE_NAME = "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-*"
SOURCE_OWNERS = ("099720109477",)

AWS_ERRORS = (BotoCoreError, ClientError, ResponseParserError)
"""What a call to AWS can raise: refused there, not reached, not understood."""


class BakeRefused(Exception):
    """The bake cannot start, or cannot go on, for a reason the person at the keyboard can change; the text says how."""


class BakeFailed(Exception):
    """Packer or a step in the builder failed; the text says which, and the log says why."""


@dataclass(frozen=True)
class Checkout:
    """What the image is built from, as git tells it."""

    commit: str
    dirty: bool


@dataclass(frozen=True)
class SourceImage:
    """The image to build on, as EC2 describes it."""

    id: str
    name: str
    owner: str


@dataclass(frozen=True)
class Packer:
    """The Packer on PATH."""

    path: str
    version: tuple[int, ...]

    @property
    def has_plugins(self) -> bool:
        """From 1.7 on amazon-ebs is a plugin to install; before, it is built in and required_plugins is refused."""
        return self.version >= (1, 7)


@dataclass(frozen=True)
class Bake:
    """One bake: what it is called and where its files are."""

    id: str
    image_version: str
    directory: Path
    mlflow_version: str = ""

    @property
    def log(self) -> Path:
        """Everything Packer and the steps said."""
        return self.directory / "bake.log"

    @property
    def template(self) -> Path:
        """The template Packer builds, staged beside the provisioning it names."""
        return self.directory / "packer"


@dataclass
class Clock:
    """Tells the story on stderr, a line a step, with the time each one took."""

    started: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)
    _quiet: bool = False

    def begin(self, step: str) -> None:
        """Ends the step before and begins this one; a step that is already under way goes on."""
        if self.steps and self.steps[-1]["step"] == step and "seconds" not in self.steps[-1]:
            return
        self.end()
        self.steps.append({"step": step})
        self._since = time.monotonic()
        print(f"  {self._since - self.started:6.1f} s  {step}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends the step under way, if there is one."""
        if self.steps and "seconds" not in self.steps[-1]:
            self.steps[-1]["seconds"] = round(time.monotonic() - self._since, 1)

    def total(self) -> float:
        """Seconds since the bake began."""
        return round(time.monotonic() - self.started, 1)


# ── What is needed before anything is started ───────────────────────────────────────────────────────────────────────


def find_packer() -> Packer:
    """The Packer on PATH; BakeRefused when there is none."""
    path = shutil.which("packer")
    if path is None:
        raise BakeRefused(
            "Packer is not installed: run make prepare (Debian's packer will do), or see https://developer.hashicorp.com/packer"
        )
    said = subprocess.run([path, "version"], check=False, capture_output=True, text=True).stdout
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        raise BakeRefused(f"{path} is not HashiCorp's Packer: `packer version` says {said.strip() or 'nothing'!r}")
    return Packer(path, tuple(int(part) for part in found.groups()))


def read_checkout() -> Checkout:
    """Commit of this checkout and whether it differs from it; what is no checkout counts as unknown and dirty."""
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=False, capture_output=True, text=True)
    if commit.returncode:
        return Checkout("unknown", True)
    paths = ["packer", "provisioning"]
    changes = subprocess.run([*git, "status", "--porcelain", "--", *paths], check=False, capture_output=True, text=True)
    return Checkout(commit.stdout.strip(), bool(changes.stdout.strip() or changes.returncode))


def connect(region: str, environment: dict[str, str]) -> Any:
    """An EC2 client for credentials that are known to work; BakeRefused says what is missing when they do not."""
    session = boto3.Session(
        aws_access_key_id=environment.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=environment.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=environment.get("AWS_SESSION_TOKEN"),
        region_name=region,
    )
    settings = Config(retries={"mode": "standard", "max_attempts": 5})
    without_account = "To try everything without an account: scripts/bake.py --local"
    try:
        account = session.client("sts", endpoint_url=environment.get("AWS_ENDPOINT_URL"), config=settings)
        account.get_caller_identity()
        return session.client("ec2", endpoint_url=ec2_endpoint(environment) or None, config=settings)
    except NoCredentialsError:
        raise BakeRefused(
            f"there are no AWS credentials: run aws configure, or set AWS_PROFILE. {without_account}"
        ) from None
    except AWS_ERRORS as error:
        raise BakeRefused(f"AWS does not accept the credentials: {brief(error)}. {without_account}") from None


def ec2_endpoint(environment: dict[str, str]) -> str:
    """URL of the EC2 API where the environment names one, looked up as AWS's SDKs do; empty for the region's own."""
    return environment.get("AWS_ENDPOINT_URL_EC2") or environment.get("AWS_ENDPOINT_URL") or ""


def find_source_image(ec2: Any, wanted: str | None, owners: tuple[str, ...]) -> SourceImage:
    """The newest image that `wanted` (an id, a name or a pattern of names) means; BakeRefused when there is none."""
    asked: dict[str, Any]
    if wanted and wanted.startswith("ami-"):
        asked = {"ImageIds": [wanted]}
    else:
        asked = {
            "Owners": list(owners),
            "Filters": [
                {"Name": "name", "Values": [wanted or SOURCE_NAME]},
                {"Name": "architecture", "Values": ["x86_64"]},
            ],
        }
    region = ec2.meta.region_name
    try:
        found = ec2.describe_images(**asked)["Images"]
    except ClientError as error:
        if error.response["Error"]["Code"].startswith("InvalidAMIID"):
            found = []
        else:
            raise BakeRefused(f"the images of region {region} cannot be read: {error}") from None
    if not found:
        raise BakeRefused(
            f"region {region} has no source image {wanted or SOURCE_NAME!r} of owner {', '.join(owners)}: "
            "name another with --source-ami, or another region with --region"
        )
    newest = max(found, key=lambda image: str(image.get("CreationDate", "")))
    if newest["Architecture"] != "x86_64":
        raise BakeRefused(f"{newest['ImageId']} is for {newest['Architecture']}, and the image is built for x86_64")
    return SourceImage(newest["ImageId"], newest["Name"], newest["OwnerId"])


def find_ca_bundle(given: str | None, environment: dict[str, str]) -> Path | None:
    """The certificates the builder downloads Python packages with: as given, or those this host is told to use."""
    named = given or environment.get("SSL_CERT_FILE") or environment.get("REQUESTS_CA_BUNDLE")
    if not named:
        return None
    if not Path(named).is_file():
        where = "--ca-bundle" if given else "SSL_CERT_FILE or REQUESTS_CA_BUNDLE"
        raise BakeRefused(f"{where} names {named}, which is no file: name a file of PEM certificates")
    return Path(named).resolve()


# ── The template, staged ────────────────────────────────────────────────────────────────────────────────────────────


def stage(bake: Bake, packer: Packer, mlflow_version: str | None) -> Bake:
    """Copies what the image is made from, so that edits during the bake change nothing, and locks `mlflow_version`."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", ".*.sw?")
    for name in ("packer", "provisioning"):
        shutil.copytree(REPOSITORY / name, bake.directory / name, ignore=unwanted, symlinks=True)
    if not packer.has_plugins:
        (bake.template / "plugins.pkr.hcl").unlink()
    locked = bake.directory / "provisioning" / "requirements.lock"
    try:
        if mlflow_version:
            lock.resolve(locked.with_suffix(".in"), locked, (f"mlflow=={mlflow_version}",))
        return Bake(bake.id, bake.image_version, bake.directory, lock.locked_version(locked, "mlflow"))
    except lock.LockError as error:
        raise BakeRefused(str(error)) from None


def digest(bake: Bake, source: SourceImage | None) -> str:
    """SHA-256 of everything that decides what is in the image: template, provisioning and source image."""
    total = hashlib.sha256(f"{source.id if source else ''}\n".encode())
    for path in sorted(path for name in ("packer", "provisioning") for path in (bake.directory / name).rglob("*")):
        if path.is_file() and path.name != "plugins.pkr.hcl":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(bake.directory)} {content}\n".encode())
    return total.hexdigest()


# ── Packer, watched ─────────────────────────────────────────────────────────────────────────────────────────────────

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
"""What Packer's messages mean to somebody who waits: the first pattern found in a line tells the step."""


def told(line: str) -> str | None:
    """The step that a line of Packer's output begins, or None."""
    for pattern, step in STORY:
        if found := re.search(pattern, line):
            return step.format(*(name.replace("_", " ") for name in found.groups()))
    return None


@contextlib.contextmanager
def interrupted_if_killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Has somebody else interrupt Packer, which then cleans up, should this process be killed while the block runs.

    A signal of the kernel's at the parent's death would not do: it reaches one process, and the one that bake.py starts
    is Packer's wrapper, which leaves interrupts to the rest of its group.
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
    """Runs Packer, keeps all it says in the log and hands on each line; BakeFailed when it fails.

    Packer has a session of its own, so that Ctrl-C reaches it once and through us: interrupted, it gets SIGINT, as a
    terminal would send it to all of the group, and time to remove the builder; interrupted again, or out of time, it
    is killed. It writes to the log itself, because what writes to a pipe that nobody reads any more is killed, and
    would remove nothing.
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
            print("bake: interrupted; Packer removes the builder (again: leave that to bake.py)", file=sys.stderr)
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
    """Each line that is added to a log, until the process that writes it has ended."""
    unfinished = ""
    while True:
        ended = process.poll() is not None
        *lines, unfinished = (unfinished + log.read()).split("\n")
        yield from lines
        if ended:
            return
        time.sleep(0.1)


def failure(log: Path, command: str) -> str:
    """What went wrong, from the end of the log: the sentences of a step or of Packer that say so."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [re.sub(r"^(==>)?\s*amazon-ebs\.mlflow: ?", "", line).rstrip() for line in text.splitlines()]
    telling = [
        line for line in lines if re.search(r"(?i)error|fail|assert_image: \w+:|refus|denied|unable|cannot", line)
    ]
    shown = telling[-12:] or [line for line in lines if line][-12:]
    return f"packer {command} failed; the whole story is in {log}\n" + "\n".join(f"    {line}" for line in shown)


@contextlib.contextmanager
def require_tokens(ec2: Any, bake: Bake) -> Iterator[None]:
    """While the block runs: makes the metadata service of each builder that appears answer IMDSv2 only.

    BakeFailed when the block ended well and no builder was held to it.
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
            except AWS_ERRORS as error:
                trouble.append(brief(error))

    watcher = threading.Thread(target=watch, daemon=True, name="imdsv2")
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(timeout=30)
    if not held:
        raise BakeFailed(f"the builder could not be held to IMDSv2: {trouble[-1]}")


# ── Clean-up ────────────────────────────────────────────────────────────────────────────────────────────────────────


def builders(ec2: Any, bake_id: str) -> list[dict[str, Any]]:
    """The instances of one bake, terminated ones included."""
    found = ec2.describe_instances(Filters=[{"Name": "tag:mlflow-ami:bake", "Values": [bake_id]}])
    return [instance for reservation in found["Reservations"] for instance in reservation["Instances"]]


def sweep(ec2: Any, bake: Bake, finished_image: str | None) -> None:
    """Removes whatever of one bake is still there, and says so. Idempotent: what is gone is no error.

    An image that the bake did not finish goes as well, snapshots included: without its facts no stack accepts it. What
    cannot be removed is named, with the remedy, and keeps nothing else from being removed.
    """

    def remove_builders() -> list[str]:
        left = [each["InstanceId"] for each in builders(ec2, bake.id) if each["State"]["Name"] != "terminated"]
        if left:
            ec2.terminate_instances(InstanceIds=left)
            ec2.get_waiter("instance_terminated").wait(InstanceIds=left, WaiterConfig={"Delay": 3, "MaxAttempts": 100})
        return [f"builder {instance_id}" for instance_id in left]

    def remove_security_groups() -> list[str]:
        made = temporary_groups(bake.log)
        groups = ec2.describe_security_groups()["SecurityGroups"] if made else []
        left = [group for group in groups if group["GroupName"] in made]
        for group in left:
            ec2.delete_security_group(GroupId=group["GroupId"])
        return [f"security group {group['GroupName']}" for group in left]

    def remove_key_pair() -> list[str]:
        name = f"mlflow-ami-bake-{bake.id}"
        if not any(pair["KeyName"] == name for pair in ec2.describe_key_pairs()["KeyPairs"]):
            return []
        ec2.delete_key_pair(KeyName=name)
        return [f"key pair {name}"]

    def remove_unfinished_image() -> list[str]:
        unfinished = [image for image in images.find(ec2, {"mlflow-ami:bake": bake.id}) if image.id != finished_image]
        return [gone for image in unfinished for gone in images.delete(ec2, image)]

    for removal in (remove_builders, remove_security_groups, remove_key_pair, remove_unfinished_image):
        try:
            for removed in removal():
                print(f"bake: removed {removed}", file=sys.stderr)
        except AWS_ERRORS as error:
            what = removal.__name__.removeprefix("remove_").replace("_", " ")
            print(f"bake: could not remove {what} of bake {bake.id}: {brief(error)}", file=sys.stderr)
            print(
                "bake: remove what is tagged mlflow-ami:bake by hand, or later: scripts/images.py sweep",
                file=sys.stderr,
            )


def brief(error: Exception) -> str:
    """An error of AWS's or on the way there as one line of a length that can be read."""
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:300]}…"


def temporary_groups(log: Path) -> list[str]:
    """Names of the security groups that Packer said it made."""
    if not log.exists():
        return []
    return re.findall(r"\bpacker_[0-9a-f-]{36}\b", log.read_text(encoding="utf-8", errors="replace"))


def prune_builds() -> None:
    """Keeps the files of the last few bakes, and of any that may still be running."""
    for old in sorted(path for path in BUILDS.iterdir() if path.is_dir())[:-KEPT_BUILDS]:
        if time.time() - old.stat().st_mtime > 86_400:
            shutil.rmtree(old, ignore_errors=True)


# ── The image ───────────────────────────────────────────────────────────────────────────────────────────────────────


def finish_image(ec2: Any, bake: Bake, inputs_digest: str) -> tuple[str, dict[str, Any]]:
    """Gives the image its facts as tags and holds its instances to IMDSv2; returns its id and the facts.

    Idempotent. The tag mlflow-ami:format comes last: what has it is complete.
    """
    built = json.loads((bake.directory / "manifest.json").read_text(encoding="utf-8"))["builds"][-1]
    image_id = built["artifact_id"].partition(":")[2]
    facts: dict[str, Any] = json.loads((bake.directory / "image.json").read_text(encoding="utf-8"))
    if facts["mlflow_version"] != bake.mlflow_version:
        raise BakeFailed(f"the lock file names MLflow {bake.mlflow_version}, the image holds {facts['mlflow_version']}")
    image = ec2.describe_images(ImageIds=[image_id])["Images"][0]
    snapshots = [d["Ebs"]["SnapshotId"] for d in image["BlockDeviceMappings"] if d.get("Ebs", {}).get("SnapshotId")]
    tags = {**images.fact_tags(facts), "mlflow-ami:inputs-digest": inputs_digest}
    ec2.create_tags(Resources=[image_id, *snapshots], Tags=[{"Key": k, "Value": v} for k, v in tags.items()])
    ec2.modify_image_attribute(ImageId=image_id, ImdsSupport={"Value": "v2.0"})
    ec2.create_tags(
        Resources=[image_id, *snapshots], Tags=[{"Key": "mlflow-ami:format", "Value": str(facts["format"])}]
    )
    return image_id, facts


def report(image: images.Image, region: str, local: bool, log: Path | None, clock: Clock) -> str:
    """What a person wants to read at the end: the image, what is in it, how to launch it."""
    tags = {key.removeprefix("mlflow-ami:"): value for key, value in image.tags.items()}
    if local:
        launch = [f"scripts/rehearse.py up --ami {image.id}", 'eval "$(scripts/connect.py --rehearsal)"']
    else:
        launch = [
            f"pulumi -C infra config set amiId {image.id} && pulumi -C infra config set aws:region {region}",
            "pulumi -C infra up",
        ]
    lines = [
        "",
        f"{image.id}  {image.name}  ({region}, {clock.total():.0f} s)",
        f"  MLflow {tags['mlflow-version']}, migration {tags['migration-count']} "
        f"({tags['migration-head']}), PostgreSQL {tags['postgresql-major']} on {tags['os']}",
        f"  from {tags['source-ami']}, commit {tags['git-commit'][:12]}"
        + (" and uncommitted changes" if tags["git-dirty"] == "true" else ""),
        *([f"  log {log}"] if log else []),
        "",
        "Launch it:",
        *(f"  {line}" for line in launch),
    ]
    return "\n".join(lines)


# ── The bake ────────────────────────────────────────────────────────────────────────────────────────────────────────


def variables(
    arguments: argparse.Namespace,
    bake: Bake,
    checkout: Checkout,
    source: SourceImage | None,
    environment: dict[str, str],
) -> list[str]:
    """The template's variables as Packer's arguments. None of them is a secret: credentials go by the environment."""
    bundle = find_ca_bundle(arguments.ca_bundle, environment)
    named: dict[str, str | None] = {
        "region": arguments.region,
        "bake_id": bake.id,
        "image_version": bake.image_version,
        "git_commit": checkout.commit,
        "git_dirty": str(checkout.dirty).lower(),
        "source_ami_name": source.name if source else None,
        "source_ami_owners": json.dumps([source.owner]) if source else None,
        "instance_type": arguments.instance_type,
        "subnet_id": arguments.subnet,
        "kms_key_id": arguments.kms_key,
        "encrypted": "false" if arguments.unencrypted else None,
        "ca_bundle": str(bundle) if bundle else None,
        "ec2_endpoint": ec2_endpoint(environment),
        "output_directory": str(bake.directory),
    }
    return [f"-var={name}={value}" for name, value in named.items() if value]


def bake_image(arguments: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Bakes the image that `arguments` describe, or finds the one that is already there; returns what --json prints.

    Raises BakeRefused or BakeFailed. Whichever way it ends, nothing temporary is left in the account.
    """
    packer = find_packer()
    checkout = read_checkout()
    now = datetime.now(UTC)
    version = now.strftime("%Y%m%dT%H%M%SZ")
    bake_id = f"{version.lower()}-{os.getpid()}"
    bake = Bake(bake_id, version, BUILDS / bake_id)

    environment, wanted = dict(os.environ), arguments.source_ami
    if arguments.local:
        clock.begin("start the embedded cloud")
        environment, wanted = local_environment(arguments, environment)
    if checkout.dirty:
        print("bake: packer/ or provisioning/ has uncommitted changes; the image will say so", file=sys.stderr)

    clock.begin("look up the source image")
    ec2 = connect(arguments.region, environment)
    source = find_source_image(ec2, wanted, tuple(arguments.source_owner or SOURCE_OWNERS))

    clock.begin(f"lock MLflow {arguments.mlflow_version}" if arguments.mlflow_version else "stage the template")
    bake.directory.mkdir(parents=True)
    prune_builds()
    bake = stage(bake, packer, arguments.mlflow_version)
    inputs_digest = digest(bake, source)
    if arguments.if_changed and (same := reusable(ec2, inputs_digest)):
        clock.end()
        shutil.rmtree(bake.directory)
        return result(same, arguments, clock, reused=True)

    if packer.has_plugins:
        clock.begin("install Packer's amazon plugin")
        run_packer(packer, ["init", str(bake.template)], bake, environment, lambda line: None)
    command = ["build", "-color=false", *variables(arguments, bake, checkout, source, environment), str(bake.template)]

    def narrate(line: str) -> None:
        if step := told(line):
            clock.begin(step)

    finished: str | None = None
    try:
        with require_tokens(ec2, bake):
            run_packer(packer, command, bake, environment, narrate)
        clock.begin("give the image its facts")
        finished, facts = finish_image(ec2, bake, inputs_digest)
        (bake.directory / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    finally:
        clock.end()
        with uninterrupted():
            sweep(ec2, bake, finished)
    image = images.read(ec2.describe_images(ImageIds=[finished])["Images"][0])
    return result(image, arguments, clock, log=bake.log)


def local_environment(arguments: argparse.Namespace, environment: dict[str, str]) -> tuple[dict[str, str], str]:
    """The environment in which AWS is the embedded cloud, and the id of the source image there."""
    from local_cloud import LocalCloud, LocalCloudError

    cloud = LocalCloud()
    try:
        cloud.up()
        wanted = arguments.source_ami or cloud.source_ami(arguments.base)
    except LocalCloudError as error:
        raise BakeRefused(str(error)) from None
    arguments.region = cloud.region
    outside = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_EC2")
    return {k: v for k, v in environment.items() if k not in outside} | cloud.environment(), wanted


def reusable(ec2: Any, inputs_digest: str) -> images.Image | None:
    """The newest finished image made from the very same inputs, or None."""
    found = images.find(ec2, {"mlflow-ami:inputs-digest": inputs_digest})
    return next((image for image in found if image.finished and image.state == "available"), None)


def result(
    image: images.Image, arguments: argparse.Namespace, clock: Clock, log: Path | None = None, reused: bool = False
) -> dict[str, Any]:
    """What --json prints about an image; `told` is the same for people."""
    facts = {
        key.removeprefix("mlflow-ami:").replace("-", "_"): value for key, value in image.tags.items() if ":" in key
    }
    return {
        "ami_id": image.id,
        "ami_name": image.name,
        "region": arguments.region,
        "reused": reused,
        "facts": facts,
        "snapshots": list(image.snapshots),
        "seconds": clock.total(),
        "steps": clock.steps,
        "log": str(log) if log else None,
        "report": report(image, arguments.region, arguments.local, log, clock),
    }


def validate(arguments: argparse.Namespace) -> None:
    """Checks the template with Packer, offline; raises BakeRefused or BakeFailed."""
    packer = find_packer()
    now = datetime.now(UTC)
    bake_id = f"{now:%Y%m%dt%H%M%Sz}-{os.getpid()}"
    bake = Bake(bake_id, f"{now:%Y%m%dT%H%M%SZ}", BUILDS / bake_id)
    bake.directory.mkdir(parents=True)
    prune_builds()
    try:
        bake = stage(bake, packer, arguments.mlflow_version)
        if packer.has_plugins:
            run_packer(packer, ["init", str(bake.template)], bake, dict(os.environ), lambda line: None)
        given = variables(arguments, bake, read_checkout(), None, dict(os.environ))
        run_packer(packer, ["validate", *given, str(bake.template)], bake, dict(os.environ), lambda line: None)
    finally:
        shutil.rmtree(bake.directory / "provisioning", ignore_errors=True)
    shutil.rmtree(bake.directory)
    version = ".".join(map(str, packer.version))
    print(f"bake: Packer {version} accepts the template, for MLflow {bake.mlflow_version}", file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="On AWS the usual credentials are used (environment, AWS_PROFILE, instance role). "
        "The log of each bake is kept below build/bake/.",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--local", action="store_true", help="bake on the embedded cloud: no AWS account, needs root")
    where.add_argument(
        "--base", choices=("debian12", "debian13"), help="source image on the embedded cloud (default debian12)"
    )
    where.add_argument("--region", help=f"AWS region (default: the environment's, else {DEFAULT_REGION})")
    where.add_argument("--instance-type", metavar="TYPE", help="instance type of the builder (default t3.medium)")
    where.add_argument("--subnet", metavar="ID", help="subnet of the builder (default: one of the default VPC)")
    what = parser.add_argument_group("what")
    what.add_argument("--mlflow-version", metavar="X", help="another MLflow release than the lock file's, as 3.12.0")
    what.add_argument(
        "--source-ami", metavar="IMAGE", help="id, name or pattern (default: Canonical's newest Ubuntu 24.04)"
    )
    what.add_argument("--source-owner", metavar="ID", action="append", help="account that may own the source image")
    what.add_argument("--unencrypted", action="store_true", help="do not encrypt the image's snapshot")
    what.add_argument("--kms-key", metavar="ID", help="encrypt with this key (default: the account's key for EBS)")
    what.add_argument(
        "--ca-bundle", metavar="FILE", help="PEM file for networks that re-sign TLS (default: SSL_CERT_FILE)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--if-changed", action="store_true", help="use the image that was made from the same inputs, if there is one"
    )
    how.add_argument("--validate", action="store_true", help="only have Packer check the template, offline")
    how.add_argument("--json", action="store_true", help="print what was baked as JSON on stdout")
    arguments = parser.parse_args(argv)
    if arguments.base and not arguments.local:
        parser.error("--base names a source image of the embedded cloud: give --local as well, or --source-ami")
    if arguments.local and arguments.region:
        parser.error("--region is for AWS: the embedded cloud has one region of its own")
    if arguments.mlflow_version and not re.fullmatch(r"\d+(\.\d+){2}\w*", arguments.mlflow_version):
        parser.error(f"--mlflow-version {arguments.mlflow_version}: give a release as it is named on PyPI, as 3.12.0")
    if arguments.kms_key and arguments.unencrypted:
        parser.error("--kms-key and --unencrypted exclude each other")
    arguments.base = arguments.base or "debian12"
    environment = os.environ
    arguments.region = (
        arguments.region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or DEFAULT_REGION
    )
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    end_like_ctrl_c()
    clock = Clock()
    try:
        if arguments.validate:
            validate(arguments)
            return 0
        baked = bake_image(arguments, clock)
    except BakeRefused as refused:
        print(f"bake: {refused}", file=sys.stderr)
        return 2
    except BakeFailed as failed:
        print(f"bake: {failed}", file=sys.stderr)
        return 1
    except AWS_ERRORS as error:
        print(f"bake: AWS refused: {brief(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bake: interrupted; no image was made and nothing is left behind", file=sys.stderr)
        return 130
    told_to_people = baked.pop("report")
    if baked["reused"]:
        print(f"bake: nothing changed since {baked['ami_id']} was made", file=sys.stderr)
    print(told_to_people, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(baked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
