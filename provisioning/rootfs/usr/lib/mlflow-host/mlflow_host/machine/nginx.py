"""Write nginx's site, which includes the host names, the certificate, the users and the sockets of MLflow."""

from __future__ import annotations

import grp
import hashlib
import importlib.util
import json
import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_host.contract.credentials import Credentials, User, password_file
from mlflow_host.machine import aws
from mlflow_host.machine.config import DATA, RUN, SERVER_SOCKETS, HostConfig, bracketed
from mlflow_host.machine.status import StepFailed

CHALLENGES = Path("/run/mlflow-host/challenges")
"""Folder from which nginx serves the responses to http-01 challenges."""

STOPPING = Path("/run/nginx/stopping")
"""While this file exists, nginx returns 429 and closes the connection (`@stopping` in the site)."""

TEMPLATES = Path("/usr/share/mlflow-host/templates")

MARKERS, MARKER_BYTES = 10_000, 64 << 10
"""Maximum number of files that `prune_markers` keeps in a folder, and maximum size of a file in bytes."""


@dataclass(frozen=True)
class Certificate:
    """The server's certificate and key, as PEM files that nginx's master process can read."""

    chain: Path
    key: Path
    trusted: bool
    """Whether a public authority signed the certificate, so that browsers trust it without configuration."""


def render_site(
    config: HostConfig,
    ui_files: Path | None,
    certificate: Certificate | None = None,
    *,
    templates: Path = TEMPLATES,
    run: Path = RUN,
) -> str:
    """The site's configuration for the http block of nginx. nginx serves MLflow's user interface from `ui_files`."""
    names = config.launch.web.hostnames
    return render(
        "site.conf.j2",
        templates,
        names=[bracketed(name) for name in names],
        origins=[f"{config.url.split(':')[0]}://{bracketed(name)}" for name in names],
        sockets=[SERVER_SOCKETS / f"server-{n}.sock" for n in range(1, config.sizing.server_processes + 1)],
        run=run,
        reports=DATA / "reports",
        ui_files=ui_files,
        certificate=certificate,
        digest=hashlib.sha256(certificate.chain.read_bytes()).hexdigest() if certificate else "",
        stores="".join(f" {address}" for address in store_addresses(config)),
        challenges=CHALLENGES,
        # A browser that has received the HSTS header refuses the host if its certificate is not trusted. Therefore
        # nginx sends the header only with a public certificate from ACME.
        hsts=certificate is not None and config.launch.web.tls == "acme" and certificate.trusted,
    )


def store_addresses(config: HostConfig) -> list[str]:
    """The origins of the buckets from which MLflow's pages read artifacts and models if transfers are direct."""
    document = config.launch
    if document.mlflow.artifact_transfer != "direct":
        return []
    if document.endpoints.s3:
        return ["/".join(document.endpoints.s3.split("/")[:3])]
    buckets = (document.buckets.artifacts, document.buckets.models)
    regional = aws.regional_address(document.stack.region, "s3").removeprefix("https://")
    return [f"https://{bucket}.{host}" for bucket in buckets for host in (regional, "s3.amazonaws.com")]


def render(template: str, templates: Path, **values: Any) -> str:
    """Render a template. Raises jinja2.UndefinedError if a variable has no value."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def ui_files() -> Path | None:
    """The folder with MLflow's built user interface. The function finds the folder without importing MLflow."""
    spec = importlib.util.find_spec("mlflow")
    for location in (spec.submodule_search_locations or []) if spec else []:
        build = Path(location, "server", "js", "build")
        if (build / "static").is_dir():
            return build
    return None


def put_users(credentials: Credentials, *, run: Path = RUN) -> None:
    """Write the users' passwords and roles, which nginx reads at every request."""
    group = grp.getgrnam("www-data").gr_gid
    write_private(run / "nginx" / "users", password_file(credentials.users), mode=0o640, group=group)
    put_roles(credentials.users, run=run)


def put_roles(users: Iterable[User], *, run: Path = RUN) -> None:
    """Write an empty file per writer and per admin. A user without a file is a reader."""
    for role in ("writer", "admin"):
        folder, names = run / "nginx" / f"{role}s", {user.name for user in users if user.role == role}
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        for file in folder.iterdir():
            if file.name not in names:
                file.unlink()
        for name in names:
            (folder / name).touch()


def prune_markers(run: Path = RUN) -> None:
    """Keep the newest `MARKERS` files in logins/ and in suspects/, and truncate files of more than `MARKER_BYTES`.

    After a login that the login server has checked, nginx adds a line to the file `logins/<address> <name>`. After a
    failed login of a user who has such a file, nginx adds a line to `suspects/<address> <name>`. The files are in
    memory. If a user has no file in logins/, the login server checks the password again.
    """
    for name in ("logins", "suspects"):
        found = sorted(
            ((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(run / name)),
            reverse=True,
        )
        for _, size, path in found[:MARKERS]:
            if size > MARKER_BYTES:
                os.truncate(path, 0)
        for *_, path in found[MARKERS:]:
            Path(path).unlink(missing_ok=True)


def put_site(config: HostConfig, certificate: Certificate | None = None, *, run: Path = RUN) -> None:
    """Write the site, and reload nginx if the site or its certificate has changed. Raises StepFailed if nginx does not
    accept the site."""
    put_login_page(config, run=run)
    site, loaded = run / "nginx" / "site.conf", run / "nginx" / "site.loaded"
    new = render_site(config, ui_files(), certificate, run=run)
    in_service = loaded.read_text() if loaded.exists() else None
    if new == in_service:
        return
    before = site.read_text() if site.exists() else ""
    write_private(site, new, mode=0o644)
    try:
        # Only mlflow-host-certificates, which passes a certificate, removes the file of the drain after a crash.
        reload_after_drain() if in_service and certificate else reload()
    except StepFailed:
        write_private(site, before, mode=0o644)
        raise
    write_private(loaded, new, mode=0o644)


def put_login_page(config: HostConfig, *, templates: Path = TEMPLATES, run: Path = RUN) -> None:
    """Write the 401 response for browsers and clients. The response says where the users and the admin's password are
    stored. The response is public, so it contains no password."""
    parameter, region = config.launch.credentials.parameter, config.launch.stack.region
    page = render("login.html.j2", templates, parameter=parameter, region=region)
    message = (
        "This server requires a user name and a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. "
        f"The users are in the parameter {parameter} of AWS Systems Manager in {region}; scripts/users.py adds users, "
        "and scripts/connect.py reads the password of admin."
    )
    write_private(run / "web" / "login.html", page, mode=0o644)
    told = json.dumps({"error_code": "UNAUTHENTICATED", "message": message})
    write_private(run / "web" / "login.json", f"{told}\n", mode=0o644)


def put_starting_certificate(certificate: Certificate, *, run: Path = RUN) -> None:
    """Use the stack's certificate for the starting page. Raises StepFailed if nginx does not accept the certificate."""
    lines = ['map "" $certificate {', '    default "";', "}"]
    lines += [f"ssl_certificate {certificate.chain};", f"ssl_certificate_key {certificate.key};"]
    write_private(run / "nginx" / "starting-tls.conf", "\n".join(lines) + "\n", mode=0o644)
    reload()


def reload() -> None:
    if subprocess.run(["systemctl", "reload-or-restart", "nginx.service"]).returncode:
        raise StepFailed("nginx does not accept the site made for it: see `journalctl -u nginx`")


def reload_after_drain(stopping: Path = STOPPING) -> None:
    """Reload nginx while it serves MLflow. nginx first returns 429 for a second and closes the clients' connections,
    because a reload resets a request that a client has just sent on an idle connection. If this process is killed,
    ExecStopPost= of the unit mlflow-host-certificates removes the file `stopping`."""
    stopping.touch()
    try:
        time.sleep(1)
        reload()
        time.sleep(0.5)  # the old workers close the connections that are still idle
    finally:
        stopping.unlink(missing_ok=True)


def write_private(path: Path, content: str, *, mode: int, group: int = -1) -> None:
    """Replace a file atomically. The new file never has more permissions than `mode`."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
        os.fchown(file.fileno(), -1, group)
        os.fchmod(file.fileno(), mode)
    new.replace(path)
