"""The servers of DB instances: start, change and stop them as moto's records in rds.py require.

Each server has a network namespace with the private address of the instance's network interface on its loopback
device. A pair of virtual Ethernet devices links the namespace to each machine in the same VPC. The server's end of the
pair has a route to the machine only while the instance's security groups allow the machine to connect to the server's
port. Without the route, the server's replies are lost and the client waits, as on AWS.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from moto.core.utils import utcnow

from scripts.local_cloud import (
    database_logins,
    database_server,
    inventory,
    moto_state,
    namespaces,
    object_store_ca,
    rds,
)
from scripts.local_cloud.database_logins import LoginServer
from scripts.local_cloud.database_server import Server
from scripts.local_cloud.layout import LocalCloudError, Places
from scripts.local_cloud.machines import Machine
from scripts.local_cloud.roles import Roles

BACKUP_INTERVAL = timedelta(days=1)
MACHINE_LINK_ADDRESS, SERVER_LINK_ADDRESS = "02:00:00:00:00:01", "02:00:00:00:00:02"


@dataclass
class Body:
    """A running DB instance. `links` maps instance IDs to linked machines and to whether the machine may connect."""

    server: Server
    address: str
    logins: LoginServer
    links: dict[str, tuple[Machine, bool]] = field(default_factory=dict)


class Databases:
    """This object owns one cloud's database servers. Threads do the slow work without the API lock. Each instance has a
    lock, so that one thread at a time changes the instance."""

    def __init__(
        self,
        places: Places,
        api: threading.RLock,
        roles: Roles,
        machines: dict[str, Machine],
        names: dict[str, str],
        stopping: threading.Event,
        spawn: Callable[..., None],
    ) -> None:
        """`names` receives the names and addresses of running databases. `spawn` calls a function in a thread."""
        self.places = places
        self.api = api
        self.roles = roles
        self.machines = machines
        self.names = names
        self.stopping = stopping
        self.spawn = spawn
        self.bodies: dict[str, Body] = {}
        self.locks: dict[str, threading.Lock] = {}

    # rds.py calls these methods while it holds the API lock

    def settle(self, resource: str) -> None:
        self.spawn(self._settle, resource)

    def copy(self, resource: str, snapshot: str) -> None:
        self.spawn(self._copy, resource, snapshot)

    def forget_copy(self, snapshot: str) -> None:
        self.spawn(shutil.rmtree, self.places.database_snapshots / snapshot, True)

    def problem(self) -> str | None:
        """Return why this cloud cannot run databases, or None."""
        if not object_store_ca.database_certificate_file(self.places).exists():
            return "this local cloud was created without a certificate for databases: create a new one after `purge`"
        if not database_server.versions():
            return "PostgreSQL is missing on this host: apt-get install postgresql"
        return None

    # The daemon calls these methods

    def restore(self) -> None:
        """Start, stop and delete databases until they match the records."""
        with self.api:
            known = {record.dbi_resource_id: record for record in rds.all_instances()}
            kept = {snapshot.body for snapshot in rds.all_snapshots()}
            for snapshot in rds.all_snapshots():
                if snapshot.status == "creating":
                    snapshot.status = "failed"
        for folder in self.places.databases.iterdir():
            if folder.name not in known:
                database_server.kill_leftover(folder)
                shutil.rmtree(folder)
        for path in self.places.database_snapshots.iterdir():
            if path.name not in kept:
                shutil.rmtree(path)
        for resource in known:
            self.settle(resource)

    def stop_all(self) -> None:
        """Stop every server. The records keep their states, so that the next `up` starts the servers."""
        threads = [threading.Thread(target=self._stop_one, args=(each,)) for each in list(self.locks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _stop_one(self, resource: str) -> None:
        with self._only_one(resource):
            self._stop(resource)

    def settle_links(self) -> None:
        """Update the names in DNS, and the routes between databases and machines. The caller holds the API lock."""
        found = {}
        for resource, body in list(self.bodies.items()):
            record = rds.find(resource)
            if record is not None:
                found[record.address] = body.address
                self._link(record, body)
        for name in set(self.names) - set(found):
            del self.names[name]
        self.names.update(found)

    def settle_backups(self) -> None:
        """Back up each instance once a day, and delete backups that are older than the instance's retention period. The
        caller holds the API lock."""
        for resource, body in list(self.bodies.items()):
            record = rds.find(resource)
            if record is None or record.status != "available" or not record.backup_retention_period:
                continue
            snapshots = rds.automated_snapshots(record)
            if not snapshots or snapshots[-1].created < utcnow() - BACKUP_INTERVAL:
                record.backend.create_automated_snapshot(record)
            usable = [snapshot for snapshot in snapshots if snapshot.status == "available"]
            first_needed = utcnow() - timedelta(days=record.backup_retention_period)
            while len(usable) > 1 and usable[1].created < first_needed:
                record.backend.delete_db_snapshot(usable.pop(0).db_snapshot_identifier)
                oldest = self.places.database_snapshots / usable[0].body
                major = body.server.configuration.major
                self.spawn(database_server.delete_archive, body.server.folder, major, oldest)

    def pid(self, resource: str) -> int | None:
        body = self.bodies.get(resource)
        return body.server.pid if body else None

    # The work of threads

    def _folder(self, resource: str) -> Path:
        return self.places.databases / resource

    @contextlib.contextmanager
    def _only_one(self, resource: str) -> Iterator[None]:
        with self.locks.setdefault(resource, threading.Lock()):
            yield

    def _settle(self, resource: str) -> None:
        with self._only_one(resource):
            with self.api:
                record = rds.find(resource)
                status = record.status if record else "deleted"
            if self.stopping.is_set() or record is None:
                return
            try:
                self._bring_to(resource, record, status)
            except Exception as error:
                traceback.print_exc()
                self._stop(resource)
                with self.api:
                    record.status, record.status_reason = "failed", str(error)
                    moto_state.save(self.places)
        with self.api:
            self.settle_links()

    def _bring_to(self, resource: str, record: Any, status: str) -> None:
        match status:
            case "creating":
                self._create(resource, record)
            case "available" | "starting" | "modifying":
                if resource not in self.bodies:
                    self._start(resource, record)
                self._modify(resource, record)
                self._rotate(resource, record)
            case "rebooting":
                self._stop(resource, crash=record.fails_over)
                self._start(resource, record)
            case "stopping":
                self._stop(resource)
            case "deleting":
                self._stop(resource)
                if record.final_snapshot and not self._copy_now(resource, record.final_snapshot):
                    raise LocalCloudError(f"{resource} is not deleted, because its final snapshot failed")
                shutil.rmtree(self._folder(resource), ignore_errors=True)
        with self.api:
            record.backend.finish(record, status)
            moto_state.save(self.places)

    def _create(self, resource: str, record: Any) -> None:
        folder = self._folder(resource)
        with self.api:
            configuration, origin = rds.configuration(record), record.origin
            password, database = rds.master_password(record), record.db_name
        database_server.kill_leftover(folder)
        if not origin:
            database_server.create(folder, configuration)
        else:
            source = self._source(origin["source"]) if origin["source"] else None
            copy = self.places.database_snapshots / origin["copy"]
            database_server.create_from(folder, copy, source, origin["until"])
        self._start(resource, record)
        if not origin:
            database_server.set_up(self.bodies[resource].server, str(password), database)
        if configuration.archives:
            with self.api:
                copy = record.backend.create_automated_snapshot(record, start=False).body
            self._copy_now(resource, copy)

    def _source(self, resource: str) -> Path:
        """Return the folder of the source of a restore, after its newest transaction is in the archive."""
        if body := self.bodies.get(resource):
            database_server.finish_archive(body.server)
        return self._folder(resource)

    def _modify(self, resource: str, record: Any) -> None:
        """Apply the record's password and configuration. Static parameters of the configuration wait for a reboot."""
        with self.api:
            configuration, password = rds.configuration(record), record.new_password
        server = self.bodies[resource].server
        if password:
            database_server.set_password(server, password)
        before = server.configuration
        if (before.port, before.memory_mib) != (configuration.port, configuration.memory_mib):
            self._stop(resource)
            self._start(resource, record)
        elif before != configuration:
            database_server.configure(self.places, server.folder, configuration)
            server.configuration = configuration
            database_server.reload(server)

    def _rotate(self, resource: str, record: Any) -> None:
        """If the rotation of the master password was requested, change the password and then the secret."""
        with self.api:
            secret = rds.secret_to_rotate(record)
        if secret is not None:
            password = rds.generate_password()
            database_server.set_password(self.bodies[resource].server, password)
            with self.api:
                rds.finish_rotation(secret, password)

    def _copy(self, resource: str, snapshot: str) -> None:
        with self._only_one(resource):
            if not self.stopping.is_set():
                self._copy_now(resource, snapshot)

    def _copy_now(self, resource: str, snapshot: str) -> bool:
        """Copy the data of an instance for the record of a snapshot with the body `snapshot`. Returns whether the copy
        is complete."""
        target, body, status = self.places.database_snapshots / snapshot, self.bodies.get(resource), "available"
        try:
            if body is not None:
                database_server.copy(body.server, target)
            else:
                database_server.copy_stopped(self._folder(resource), target)
        except Exception:
            traceback.print_exc()
            status = "failed"
        with self.api:
            for record in rds.all_snapshots():
                if record.body == snapshot:
                    record.status, record.completed = status, utcnow()
            moto_state.save(self.places)
        return status == "available"

    def _start(self, resource: str, record: Any) -> None:
        folder = self._folder(resource)
        with self.api:
            configuration, address = rds.configuration(record), rds.private_address(record)
        database_server.configure(self.places, folder, configuration)
        server = database_server.adopt(folder, configuration)
        if server is None:
            namespace = namespaces.create()
            try:
                namespaces.run_inside(namespace, [f"address add {address}/32 dev lo"])
                server = database_server.start(folder, configuration, namespace)
            except BaseException:
                os.close(namespace)
                raise
        listening = namespaces.listener("127.0.0.1", database_server.LOGIN_PORT, server.namespace)
        body = Body(server, address, LoginServer(listening, lambda user, token: self._admits(resource, user, token)))
        self.bodies[resource] = body
        threading.Thread(target=self._watch, args=(resource, body), daemon=True).start()

    def _admits(self, resource: str, user: str, token: str) -> bool:
        with self.api:
            record = rds.find(resource)
            refusal = database_logins.refusal(token, user, record, self.roles)
        if refusal:
            print(f"{record.address} refused an IAM login of {user!r}: {refusal}", flush=True)
        return refusal is None

    def _stop(self, resource: str, *, crash: bool = False) -> None:
        body = self.bodies.pop(resource, None)
        if body is None:
            database_server.kill_leftover(self._folder(resource))
            return
        if crash:
            database_server.kill(body.server)
        else:
            database_server.stop(body.server)
        body.logins.close()
        body.server.release()

    def _watch(self, resource: str, body: Body) -> None:
        """Start the server again if it ends without an API call, as RDS does after a crash."""
        body.server.ended(-1)
        with self._only_one(resource):
            if self.bodies.get(resource) is not body or self.stopping.is_set():
                return
            self._stop(resource)
        self.settle(resource)

    # Networks

    def _link(self, record: Any, body: Body) -> None:
        interface = rds.interface(record)
        for instance, machine in list(self.machines.items()):
            owner = inventory.find(instance)
            if owner is None or owner.vpc_id != interface.vpc_id:
                continue
            allowed = admits(interface.group_set, record.port, owner)
            if body.links.get(instance) != (machine, allowed):
                try:
                    self._connect(record, body, machine, owner.private_ip, allowed)
                except OSError as error:  # tried again after a second; the machine or the server may have just ended
                    print(f"cannot link {instance} to {record.address}: {error}", flush=True)
                else:
                    body.links[instance] = (machine, allowed)

    def _connect(self, record: Any, body: Body, machine: Machine, private_address: str, allowed: bool) -> None:
        """Link a machine to a database if they are not linked, and allow or forbid connections."""
        near, far = f"rds{record.dbi_resource_id[3:14].lower()}", f"vm{machine.instance[-11:]}"
        known = body.links.get(machine.instance)
        if known is None or known[0] is not machine:
            with contextlib.suppress(OSError):  # a link of an earlier daemon
                namespaces.run_inside(machine.namespace, [f"link delete {near}"])
            peer = f"peer name {far} address {SERVER_LINK_ADDRESS} netns /proc/{os.getpid()}/fd/{body.server.namespace}"
            namespaces.run_inside(
                machine.namespace,
                [
                    f"link add {near} address {MACHINE_LINK_ADDRESS} type veth {peer}",
                    f"link set {near} up",
                    f"neighbour replace {body.address} lladdr {SERVER_LINK_ADDRESS} dev {near} nud permanent",
                    f"route replace {body.address}/32 dev {near} src {private_address}",
                ],
            )
            neighbour = f"neighbour replace {private_address} lladdr {MACHINE_LINK_ADDRESS} dev {far} nud permanent"
            namespaces.run_inside(body.server.namespace, [f"link set {far} up", neighbour])
        route = f"{private_address}/32 dev {far}"
        if allowed:
            namespaces.run_inside(body.server.namespace, [f"route replace {route} src {body.address}"])
        elif known is not None and known[1]:
            namespaces.run_inside(body.server.namespace, [f"route delete {route}"])


def admits(groups: list[Any], port: int, machine: Any) -> bool:
    """Return whether a rule of the security groups allows TCP connections of the machine to the port."""
    address = ipaddress.ip_address(machine.private_ip)
    members = {group.id for nic in machine.nics.values() for group in nic.group_set}
    for rule in [rule for group in groups for rule in group.ingress_rules]:
        if rule.ip_protocol not in ("tcp", "-1") or (
            rule.ip_protocol == "tcp" and not rule.from_port <= port <= rule.to_port
        ):
            continue
        if rule.source_group.get("GroupId") in members:
            return True
        if rule.cidr_ipv4 and address in ipaddress.ip_network(rule.cidr_ipv4, strict=False):
            return True
    return False
