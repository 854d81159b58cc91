"""nginx's part: which site is served under which names, and by which server processes."""

from __future__ import annotations

import grp
import importlib.util
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_host.config import RUN, SERVER_SOCKETS, HostConfig
from mlflow_host.credentials import Credentials, password_file
from mlflow_host.status import StepFailed

CHALLENGES = Path("/run/mlflow-host/challenges")
"""Where a certificate authority finds the answers to its http-01 challenges."""

TEMPLATES = Path("/usr/share/mlflow-host/templates")


@dataclass(frozen=True)
class Certificate:
    """What the server shows: PEM files that nginx's master process can read."""

    chain: Path
    key: Path
    trusted: bool
    """By browsers as they come, so signed by a public authority."""


def render_site(
    config: HostConfig,
    ui_files: Path | None,
    certificate: Certificate | None = None,
    *,
    templates: Path = TEMPLATES,
    run: Path = RUN,
) -> str:
    """The site as nginx reads it, at its http level. `ui_files`: MLflow's built user interface, served from disk."""
    names = config.launch.web.hostnames
    return render(
        "site.conf.j2",
        templates,
        names=[bracketed(name) for name in names],
        origins=[f"{config.url.split(':')[0]}://{bracketed(name)}" for name in names],
        sockets=[SERVER_SOCKETS / f"server-{n}.sock" for n in range(1, config.sizing.server_processes + 1)],
        run=run,
        ui_files=ui_files,
        certificate=certificate,
        challenges=CHALLENGES,
        # A browser that was told so would never again open an address that has lost its trusted certificate.
        hsts=certificate is not None and config.launch.web.tls == "acme" and certificate.trusted,
    )


def render(template: str, templates: Path, **values: Any) -> str:
    """A template of ours filled in; a name it needs and is not given raises jinja2.UndefinedError."""
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
    """Where the installed MLflow keeps its built user interface; found without importing it."""
    spec = importlib.util.find_spec("mlflow")
    for location in (spec.submodule_search_locations or []) if spec else []:
        build = Path(location, "server", "js", "build")
        if (build / "static").is_dir():
            return build
    return None


def put_users(credentials: Credentials, *, run: Path = RUN) -> bool:
    """Put the users in service; nginx reads their passwords at every request. Returns whether somebody's role is
    another now, for which nginx has to be reloaded."""
    group = grp.getgrnam("www-data").gr_gid
    write_private(run / "nginx" / "users", password_file(credentials.users), mode=0o640, group=group)
    roles = run / "nginx" / "roles.map"
    before = roles.read_text() if roles.exists() else None
    write_private(roles, "".join(f'"{user.name}" {user.role};\n' for user in credentials.users), mode=0o644)
    return before != roles.read_text()


def put_site(config: HostConfig, certificate: Certificate | None = None, *, run: Path = RUN) -> None:
    """Put the site in service. Raises StepFailed when nginx does not accept it."""
    site = run / "nginx" / "site.conf"
    before = site.read_text() if site.exists() else ""
    write_private(site, render_site(config, ui_files(), certificate, run=run), mode=0o644)
    try:
        reload()
    except StepFailed:
        write_private(site, before, mode=0o644)
        raise


def reload() -> None:
    if subprocess.run(["systemctl", "reload-or-restart", "nginx.service"]).returncode:
        raise StepFailed("nginx does not accept the site made for it: see `journalctl -u nginx`")


def write_private(path: Path, content: str, *, mode: int, group: int = -1) -> None:
    """Replace a file whole; at no moment is it more readable than `mode`."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
        os.fchown(file.fileno(), -1, group)
        os.fchmod(file.fileno(), mode)
    new.replace(path)


def bracketed(name: str) -> str:
    """A host as URLs have it: IPv6 addresses in brackets."""
    return f"[{name}]" if ":" in name else name
