"""Write nginx's site: host names, certificates, users, and the server processes behind it."""

from __future__ import annotations

import grp
import importlib.util
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_host.contract.credentials import Credentials, password_file
from mlflow_host.machine import aws
from mlflow_host.machine.config import DATA, RUN, SERVER_SOCKETS, HostConfig, bracketed
from mlflow_host.machine.status import StepFailed

CHALLENGES = Path("/run/mlflow-host/challenges")
"""Folder of the responses to http-01 challenges."""

TEMPLATES = Path("/usr/share/mlflow-host/templates")

MARKERS, MARKER_BYTES = 10_000, 64 << 10
"""Maximum number of files of a kind that `prune_markers` keeps, and maximum size of one in bytes."""


@dataclass(frozen=True)
class Certificate:
    """The server's certificate: PEM files that nginx's master process can read."""

    chain: Path
    key: Path
    trusted: bool
    """Whether browsers trust it without configuration: it is signed by a public authority."""


def render_site(
    config: HostConfig,
    ui_files: Path | None,
    certificate: Certificate | None = None,
    *,
    templates: Path = TEMPLATES,
    run: Path = RUN,
) -> str:
    """The site's configuration, for nginx's http block. `ui_files`: MLflow's built user interface, served from disk."""
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
        stores="".join(f" {address}" for address in store_addresses(config)),
        challenges=CHALLENGES,
        # With HSTS a browser refuses an address that no longer has a trusted certificate.
        hsts=certificate is not None and config.launch.web.tls == "acme" and certificate.trusted,
    )


def store_addresses(config: HostConfig) -> list[str]:
    """The origins of the two buckets, from which MLflow's pages read files if transfers are direct."""
    document = config.launch
    if document.mlflow.artifact_transfer != "direct":
        return []
    if document.endpoints.s3:
        return ["/".join(document.endpoints.s3.split("/")[:3])]
    buckets = (document.buckets.artifacts, document.buckets.models)
    regional = aws.regional_address(document.stack.region, "s3").removeprefix("https://")
    return [f"https://{bucket}.{host}" for bucket in buckets for host in (regional, "s3.amazonaws.com")]


def render(template: str, templates: Path, **values: Any) -> str:
    """A filled-in template. Raises jinja2.UndefinedError for a variable without a value."""
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
    """The folder of MLflow's built user interface, located without importing MLflow."""
    spec = importlib.util.find_spec("mlflow")
    for location in (spec.submodule_search_locations or []) if spec else []:
        build = Path(location, "server", "js", "build")
        if (build / "static").is_dir():
            return build
    return None


def put_users(credentials: Credentials, *, run: Path = RUN) -> bool:
    """Write the users' passwords and roles. nginx reads passwords at every request. Returns whether a role changed,
    which needs a reload of nginx."""
    group = grp.getgrnam("www-data").gr_gid
    write_private(run / "nginx" / "users", password_file(credentials.users), mode=0o640, group=group)
    roles = run / "nginx" / "roles.map"
    before = roles.read_text() if roles.exists() else None
    write_private(roles, "".join(f'"{user.name}" {user.role};\n' for user in credentials.users), mode=0o644)
    return before != roles.read_text()


def prune_markers(run: Path = RUN) -> None:
    """Keep the newest `MARKERS` files of logins and of failed logins; truncate the long ones.

    Each file has one line per event, in memory. A login without a file is checked again.
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
    """Write the site. Raises StepFailed if nginx does not accept it."""
    put_login_page(config, run=run)
    site = run / "nginx" / "site.conf"
    before = site.read_text() if site.exists() else ""
    write_private(site, render_site(config, ui_files(), certificate, run=run), mode=0o644)
    try:
        reload()
    except StepFailed:
        write_private(site, before, mode=0o644)
        raise


def put_login_page(config: HostConfig, *, templates: Path = TEMPLATES, run: Path = RUN) -> None:
    """Write the 401 response for browsers and clients. It says where the users and the admin's password are. It is
    public, so it contains no password."""
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
    """Use the stack's own certificate for the starting page. Raises StepFailed if nginx does not accept it."""
    lines = ['map "" $certificate {', '    default "";', "}"]
    lines += [f"ssl_certificate {certificate.chain};", f"ssl_certificate_key {certificate.key};"]
    write_private(run / "nginx" / "starting-tls.conf", "\n".join(lines) + "\n", mode=0o644)
    reload()


def reload() -> None:
    if subprocess.run(["systemctl", "reload-or-restart", "nginx.service"]).returncode:
        raise StepFailed("nginx does not accept the site made for it: see `journalctl -u nginx`")


def write_private(path: Path, content: str, *, mode: int, group: int = -1) -> None:
    """Replace a file atomically; its permissions never exceed `mode`."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
        os.fchown(file.fileno(), -1, group)
        os.fchmod(file.fileno(), mode)
    new.replace(path)
