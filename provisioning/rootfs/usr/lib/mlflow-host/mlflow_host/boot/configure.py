"""Boot step `configure`: write the files in /run that the other boot steps read. The step computes these files from the
launch document, the credentials and the machine's size. The step is idempotent."""

from __future__ import annotations

import subprocess

from mlflow_host.contract import sizing
from mlflow_host.machine import config, nginx, parameters
from mlflow_host.machine.config import HostConfig
from mlflow_host.machine.status import StepFailed, step
from mlflow_host.postgres import pgbackrest, reader_role
from mlflow_host.server import environment


def main() -> None:
    with step("configure") as s:
        document = config.launch_document()
        machine = sizing.this_machine()
        host = config.host_config(document, sizing.size(machine, job_execution=document.mlflow.job_execution))
        s.say(f"{machine.memory_mb} MiB and {machine.cores} cores: {host.sizing.server_processes} server processes")
        nginx.write_private(config.CONFIG, config.dump(host), mode=0o644)
        nginx.write_private(config.RUN / "postgresql.conf", postgresql_settings(host), mode=0o644)
        put_backups(host)

        s.say(f"fetching the credentials from {document.credentials.parameter}")
        found = parameters.fetch(document, s.say)
        variables = environment.environment(host, found.kek_passphrase)
        nginx.write_private(config.RUN / "mlflow.env", environment_file(variables), mode=0o600)
        nginx.put_users(found)
        reader_role.put_access(host)
        if document.web.tls == "off":
            nginx.put_site(host)
        start(*units_of(host))
        s.say(f"the machine will serve {host.url}")


def postgresql_settings(host: HostConfig) -> str:
    return nginx.render(
        "postgresql.conf.j2",
        nginx.TEMPLATES,
        sizing=host.sizing,
        postgres=host.launch.postgres,
        archives=pgbackrest.archives(host.launch),
    )


def put_backups(host: HostConfig) -> None:
    """Write pgBackRest's settings, the CA certificate of the bucket's endpoint, and the restore request."""
    authority = host.launch.backups.authority
    if authority:
        nginx.write_private(pgbackrest.AUTHORITY, authority, mode=0o644)
    nginx.write_private(pgbackrest.SETTINGS, pgbackrest.settings(host), mode=0o644)
    if host.launch.backups.restore_from:
        nginx.write_private(pgbackrest.RESTORE_ASKED, host.launch.backups.restore_from, mode=0o644)
    else:
        pgbackrest.RESTORE_ASKED.unlink(missing_ok=True)


def environment_file(variables: dict[str, str]) -> str:
    """Text for systemd's EnvironmentFile=. Raises StepFailed if a value contains a character that is not printable."""
    unprintable = [name for name, value in variables.items() if not value.isprintable()]
    if unprintable:
        raise StepFailed(f"{', '.join(unprintable)} would contain control characters: correct the launch document")
    return "".join(f'{name}="{_escaped(value)}"\n' for name, value in sorted(variables.items()))


def _escaped(value: str) -> str:
    return "".join(f"\\{character}" if character in '\\"$`' else character for character in value)


def units_of(host: HostConfig) -> list[str]:
    """The units that `configure` starts: renewal of MLflow's credentials, certificates, and server processes."""
    encrypted = ["mlflow-host-certificates.service", "mlflow-host-certificates.timer"]
    keys = ["mlflow-host-server-credentials.service", "mlflow-host-server-credentials.timer"]
    return [*keys, *([] if host.launch.web.tls == "off" else encrypted), *host.server_units]


def start(*units: str) -> None:
    """Tell systemd to start the units, and do not wait. systemd starts the units in the order of their dependencies:
    the server processes start after the boot step `database`."""
    subprocess.run(["systemctl", "start", "--no-block", *units], check=True)


if __name__ == "__main__":
    main()
