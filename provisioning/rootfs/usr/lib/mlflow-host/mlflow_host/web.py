"""nginx's part: which site is served under which names, and by which server processes."""

from __future__ import annotations

import grp
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

from mlflow_host.config import RUN, SERVER_SOCKETS, HostConfig
from mlflow_host.credentials import Credentials, password_file
from mlflow_host.status import StepFailed

TEMPLATES = Path("/usr/share/mlflow-host/templates")


def render_site(config: HostConfig, ui_files: Path | None, *, templates: Path = TEMPLATES, run: Path = RUN) -> str:
    """The site as nginx reads it, at its http level. `ui_files`: MLflow's built user interface, served from disk."""
    return render(
        "site.conf.j2",
        templates,
        names=[bracketed(name) for name in config.launch.web.hostnames],
        origins=[f"{config.url.split(':')[0]}://{bracketed(name)}" for name in config.launch.web.hostnames],
        sockets=[SERVER_SOCKETS / f"server-{n}.sock" for n in range(1, config.sizing.server_processes + 1)],
        run=run,
        ui_files=ui_files,
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


def install(config: HostConfig, credentials: Credentials, *, run: Path = RUN) -> None:
    """Put the site and its users in service. Raises StepFailed when nginx does not accept it."""
    group = grp.getgrnam("www-data").gr_gid
    write_private(run / "nginx" / "users", password_file(credentials.users), mode=0o640, group=group)
    site = run / "nginx" / "site.conf"
    before = site.read_text() if site.exists() else ""
    write_private(site, render_site(config, ui_files(), run=run), mode=0o644)
    if subprocess.run(["systemctl", "reload-or-restart", "nginx.service"]).returncode:
        write_private(site, before, mode=0o644)
        raise StepFailed(f"nginx does not accept the site made for {config.url}: see `journalctl -u nginx`")


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
