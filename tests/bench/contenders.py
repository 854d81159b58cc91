"""The servers of the benchmark. Each server has its own PostgreSQL and nginx, which listen on loopback."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from scripts.rehearsal.status_document import PIECES
from tests.bench import environments
from tests.bench.load import Dataset, Target
from tests.bench.seed import seed
from tests.support import services
from tests.support.services import family
from tests.support.shipped_nginx import HOST, ROOTFS, moved, running_nginx, starting_site

USER, PASSWORD = "ada", "correct horse battery staple"
USERS = 64
"""The number of additional users of `ours`, one per client, because the server limits each user's requests."""
MACHINE_MEMORY_MB = 2048
"""The memory of a t3.small, for which `ours` is sized. The benchmark's machine should have two cores, like a
t3.small."""


@dataclass(frozen=True)
class Contender:
    name: str
    what: str
    """One line for the report."""
    target: Target
    url: str
    data: Dataset
    cluster: services.PostgreSQL
    servers: tuple[int, ...]
    """The process IDs of the servers. `processes` adds their child processes."""
    unguarded: Target | None = None
    """The address of the contender's server behind an nginx that requires no login, or None."""
    exports: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that the contender's clients need in addition to URL and login."""

    def processes(self) -> list[int]:
        return [pid for server in self.servers for pid in family(server)]

    @property
    def client_environment(self) -> dict[str, str]:
        verified = {"MLFLOW_TRACKING_SERVER_CERT_PATH": self.target.authority} if self.target.authority else {}
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
            **verified,
            **self.exports,
        }


Start = Callable[[Path, services.ObjectStore], "contextlib.AbstractContextManager[Contender]"]


@contextlib.contextmanager
def tutorial(folder: Path, store: services.ObjectStore) -> Iterator[Contender]:
    """The set-up of tutorials: `mlflow server` with defaults, a PostgreSQL password, nginx with a bcrypt file."""
    with contextlib.ExitStack() as stack:
        cluster, data = stack.enter_context(seeded_cluster(folder / "postgresql", {}))
        port, site_port = services.free_port(), services.free_port()
        server = stack.enter_context(mlflow_server(folder, store, cluster, port))
        users = subprocess.run(["htpasswd", "-nbB", USER, PASSWORD], check=True, capture_output=True, text=True).stdout
        (folder / "users").write_text(users)
        configuration = folder / "nginx.conf"
        configuration.write_text(TUTORIAL_NGINX.format(folder=folder, port=port, site_port=site_port))
        stack.enter_context(running_nginx(configuration, site_port, folder / "nginx.log"))
        yield Contender(
            "tutorial",
            "`mlflow server` with its defaults (4 workers), PostgreSQL over TCP with a password, nginx with bcrypt",
            Target((HOST, site_port), HOST, (authorization(),)),
            f"http://{HOST}:{site_port}",
            data,
            cluster,
            (server.pid,),
        )


TUTORIAL_NGINX = """
user www-data;
worker_processes auto;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 768; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 0;
    server {{
        listen 127.0.0.1:{site_port};
        auth_basic "MLflow";
        auth_basic_user_file {folder}/users;
        location / {{
            proxy_pass http://127.0.0.1:{port};
            proxy_set_header Host $host;
        }}
    }}
}}
"""


@contextlib.contextmanager
def basic_auth(folder: Path, store: services.ObjectStore) -> Iterator[Contender]:
    """MLflow's own login: `mlflow server --app-name basic-auth`, without nginx."""
    packages = environments.auth_packages()
    with contextlib.ExitStack() as stack:
        cluster, data = stack.enter_context(seeded_cluster(folder / "postgresql", {}))
        cluster.execute("create database login")
        port = services.free_port()
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = EDIT\ndatabase_uri = {cluster.uri('login', tcp=True)}\n"
            f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        settings = {
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "not a secret",
            "PYTHONPATH": str(packages),
        }
        arguments = ("--app-name", "basic-auth")
        server = stack.enter_context(mlflow_server(folder, store, cluster, port, *arguments, settings=settings))
        yield Contender(
            "basic-auth",
            "`mlflow server --app-name basic-auth` with its defaults, nothing in front",
            Target((HOST, port), HOST, (authorization(),)),
            f"http://{HOST}:{port}",
            data,
            cluster,
            (server.pid,),
        )


@contextlib.contextmanager
def mlflow_server(
    folder: Path,
    store: services.ObjectStore,
    cluster: services.PostgreSQL,
    port: int,
    *arguments: str,
    settings: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `mlflow server` on the loopback interface; stop the server and its children at the end."""
    bucket = f"{folder.name}-one"
    store.client().create_bucket(Bucket=bucket)
    command = [str(environments.tutorial().with_name("mlflow")), "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", cluster.uri(tcp=True), "--artifacts-destination", f"s3://{bucket}"]
    command += ["--allowed-hosts", f"{HOST},{HOST}:*", *arguments]
    (folder / "tmp").mkdir()
    environment = {**os.environ, **store.environment, "TMPDIR": str(folder / "tmp"), **(settings or {})}
    # The server runs in its own session. In the terminal's session, a hangup of the terminal would make uvicorn's
    # supervisor start new workers while the server stops.
    with services.process(command, folder / "server.log", env=environment, start_new_session=True) as running:
        services.wait_until(lambda: answers(port), running, folder / "server.log")
        time.sleep(5)  # the job runner and its consumers start after the workers
        children = family(running.pid)
        try:
            yield running
        finally:
            signal_all(children, signal.SIGCONT)
            running.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(15)
            signal_all(children[1:], signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


def answers(port: int) -> bool:
    return services.answers(f"http://{HOST}:{port}/health")


@contextlib.contextmanager
def ours(folder: Path, store: services.ObjectStore, transfer: str = "direct") -> Iterator[Contender]:
    """The image's server process, PostgreSQL configuration and nginx, sized for a machine with 2 GiB. `transfer` is the
    value of artifact_transfer in the launch document."""
    from mlflow_host.boot import private_ca
    from mlflow_host.contract import credentials, launch, sizing
    from mlflow_host.machine import config, nginx
    from mlflow_host.server import environment

    buckets = {kind: f"{folder.name}-{kind}" for kind in ("artifacts", "models", "backups")}
    for bucket in buckets.values():
        store.client().create_bucket(Bucket=bucket)
    document = launch.LaunchDocument(
        stack=launch.Stack("bench", "eu-central-1"),
        buckets=launch.Buckets(**buckets),
        credentials=launch.CredentialsParameter("/bench"),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web((HOST,), tls="private"),
        mlflow=launch.Mlflow(artifact_transfer=transfer),
        endpoints=launch.Endpoints(s3=store.endpoint),
    )
    machine = sizing.MachineSize(MACHINE_MEMORY_MB, sizing.this_machine().cores)
    host = config.host_config(document, sizing.size(machine))
    templates = ROOTFS / "usr/share/mlflow-host/templates"
    shipped = nginx.render(
        "postgresql.conf.j2", templates, sizing=host.sizing, postgres=document.postgres, archives=False
    )
    with contextlib.ExitStack() as stack:
        cluster, data = stack.enter_context(seeded_cluster(folder / "postgresql", postgresql_settings(shipped)))
        (folder / "tmp").mkdir()
        variables = {
            **environment.environment(host, "a passphrase for measurements"),
            "MLFLOW_BACKEND_STORE_URI": cluster.uri(),
            "TMPDIR": str(folder / "tmp"),
            **store.environment,
        }
        sockets_folder = folder / "run/mlflow"
        processes = stack.enter_context(
            services.server_processes(
                sockets_folder, variables, host.sizing.server_processes, str(environments.image())
            )
        )
        port = services.free_port()
        listens = {443: f"{HOST}:{port}", 80: f"unix:{folder}/plain.sock"}
        configuration = starting_site(folder, listens)
        run = folder / "run/mlflow-host"
        authority = private_ca.ensure((HOST,), folder / "certificates")
        certificate = nginx.Certificate(authority.certificate, authority.key, trusted=False)
        site = nginx.render_site(host, nginx.ui_files(), certificate, templates=templates, run=run)
        site, open_port = moved(site, folder, listens), services.free_port()
        (run / "nginx/site.conf").write_text(site + without_login(site, port, open_port))
        names = (USER, *(f"user-{number}" for number in range(USERS)))
        users = tuple(credentials.User(name, PASSWORD, "admin") for name in names)
        (run / "nginx/users").write_text(credentials.password_file(users))
        nginx.put_roles(users, run=run)
        stack.enter_context(running_nginx(configuration, port, folder / "nginx.log"))
        yield Contender(
            folder.name,
            f"the image's server: {len(processes)} processes on Unix sockets, sized for {MACHINE_MEMORY_MB} MiB, "
            f"the image's settings of PostgreSQL and nginx, HTTPS, a login, file transfer {transfer}",
            Target(
                (HOST, port),
                HOST,
                (authorization(),),
                authority=str(authority.ca),
                logins=tuple(map(authorization, names[1:])),
            ),
            f"https://{HOST}:{port}",
            data,
            cluster,
            tuple(running.pid for running in processes),
            Target((HOST, open_port), HOST, (authorization(),), authority=str(authority.ca)),
            PIECES,
        )


def postgresql_settings(shipped: str) -> dict[str, str]:
    """Return the settings of a rendered postgresql.conf, without the settings that contain paths or addresses."""
    found = dict(re.findall(r"^(\w+) = '?([^'\n]*)'?$", shipped, re.MULTILINE))
    places = {"hba_file", "ident_file", "listen_addresses", "unix_socket_directories", "lc_messages"}
    return {name: value for name, value in found.items() if name not in places}


def without_login(site: str, port: int, open_port: int) -> str:
    """Return a copy of MLflow's server block, the last block of the site, on another port and without a login."""
    server = site[site.rindex("\nserver {") :]
    for guard in ("auth_request /mlflow-host-login;", "auth_basic $known_realm;"):
        assert guard in server
        server = server.replace(guard, f"{guard.split()[0]} off;")
    assert f":{port} " in server
    return server.replace(f":{port} ", f":{open_port} ")


@contextlib.contextmanager
def seeded_cluster(folder: Path, settings: Mapping[str, str]) -> Iterator[tuple[services.PostgreSQL, Dataset]]:
    with services.postgresql(folder, settings) as cluster:
        cluster.execute("create database mlflow")
        services.create_schema(cluster.uri(), str(environments.image()))
        yield cluster, seed(cluster, "mlflow")


def authorization(user: str = USER) -> str:
    return "Authorization: Basic " + base64.b64encode(f"{user}:{PASSWORD}".encode()).decode()


# Processes


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class HasProcesses(Protocol):
    def processes(self) -> list[int]: ...


@contextlib.contextmanager
def alone(contender: HasProcesses, others: Sequence[HasProcesses]) -> Iterator[None]:
    """Suspend the other contenders' processes, which keep their caches, so that one contender is measured at a time."""
    paused = [pid for other in others if other is not contender for pid in other.processes()]
    signal_all(paused, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_all(paused, signal.SIGCONT)


def memory_mb(pids: list[int]) -> float:
    """Return the sum of the processes' proportional set sizes (PSS) in MB."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


class PeakMemory:
    """Measure the peak memory of a contender's server during the `with` block, five times per second."""

    def __init__(self, contender: Contender):
        self.contender, self.mb = contender, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._done.wait(0.2):
            self.mb = max(self.mb, memory_mb(self.contender.processes()))

    def __enter__(self) -> PeakMemory:
        self.mb = memory_mb(self.contender.processes())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


CONTENDERS: dict[str, Start] = {
    "tutorial": tutorial,
    "basic-auth": basic_auth,
    "ours": ours,
    "ours-proxied": partial(ours, transfer="proxied"),
}
BY_DEFAULT = ("tutorial", "basic-auth", "ours")
