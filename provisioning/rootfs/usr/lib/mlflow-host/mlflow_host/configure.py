"""Boot step "configure": from the launch document, the credentials and the size of the machine to everything the other
steps read in /run. Safe to run again at any time."""

from __future__ import annotations

import subprocess

from mlflow_host import config, credentials, reader, server, sizing, web
from mlflow_host.backups import repository
from mlflow_host.config import HostConfig
from mlflow_host.status import StepFailed, step


def main() -> None:
    with step("configure") as s:
        document = config.launch_document()
        machine = sizing.this_machine()
        host = config.host_config(document, sizing.size(machine, job_execution=document.mlflow.job_execution))
        s.say(f"{machine.memory_mb} MiB and {machine.cores} cores: {host.sizing.server_processes} server processes")
        web.write_private(config.CONFIG, config.dump(host), mode=0o644)
        web.write_private(config.RUN / "postgresql.conf", postgresql_settings(host), mode=0o644)
        put_backups(host)

        s.say(f"fetching the credentials from {document.credentials.parameter}")
        found = credentials.fetch(document, s.say)
        variables = server.environment(host, found.kek_passphrase)
        web.write_private(config.RUN / "mlflow.env", environment_file(variables), mode=0o600)
        web.put_users(found)
        reader.put_access(host)
        if document.web.tls == "off":
            web.put_site(host)
        start(*units_of(host))
        s.say(f"the machine is to serve {host.url}")


def postgresql_settings(host: HostConfig) -> str:
    return web.render(
        "postgresql.conf.j2",
        web.TEMPLATES,
        sizing=host.sizing,
        postgres=host.launch.postgres,
        archives=repository.archives(host.launch),
    )


def put_backups(host: HostConfig) -> None:
    """Where backups go to, by which authority that address is verified, and whether one is to be restored."""
    authority = host.launch.backups.authority
    if authority:
        web.write_private(repository.AUTHORITY, authority, mode=0o644)
    web.write_private(repository.SETTINGS, repository.settings(host), mode=0o644)
    if host.launch.backups.restore_from:
        web.write_private(repository.RESTORE_ASKED, host.launch.backups.restore_from, mode=0o644)
    else:
        repository.RESTORE_ASKED.unlink(missing_ok=True)


def environment_file(variables: dict[str, str]) -> str:
    """For systemd's EnvironmentFile=. Raises StepFailed for a value that cannot be written there."""
    unprintable = [name for name, value in variables.items() if not value.isprintable()]
    if unprintable:
        raise StepFailed(f"{', '.join(unprintable)} would contain control characters: correct the launch document")
    return "".join(f'{name}="{_escaped(value)}"\n' for name, value in sorted(variables.items()))


def _escaped(value: str) -> str:
    return "".join(f"\\{character}" if character in '\\"$`' else character for character in value)


def units_of(host: HostConfig) -> list[str]:
    """What not every machine runs: as many server processes as it is big enough for, and the certificate's units."""
    encrypted = ["mlflow-host-certificates.service", "mlflow-host-certificates.timer"]
    return host.server_units if host.launch.web.tls == "off" else [*encrypted, *host.server_units]


def start(*units: str) -> None:
    """Queue units; systemd starts them in their order, the servers after the database step."""
    subprocess.run(["systemctl", "start", "--no-block", *units], check=True)


if __name__ == "__main__":
    main()
