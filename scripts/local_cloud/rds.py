"""The RDS API with real databases: this module connects moto's records with the PostgreSQL servers of databases.py.

moto handles every request and stores every record. This module overrides moto's methods that differ from RDS, as the
pages of the API calls in the Amazon RDS API Reference describe them:

DB instances pass through the states creating, modifying, rebooting, stopping, starting and deleting, and have their own
  resource ID. An instance has an endpoint when it is created, and a network interface in a subnet of its group.
CreateDBInstance and ModifyDBInstance refuse engines, versions, classes and storage that are not offered
  (rds_offers.py), and missing or foreign subnet groups, security groups and parameter groups.
ModifyDBInstance without ApplyImmediately changes the class, storage, version, port and availability in the maintenance
  window. The local cloud has no such window: the values stay in PendingModifiedValues until the next ApplyImmediately.
DeleteDBInstance requires a final snapshot or SkipFinalSnapshot.
RebootDBInstance with ForceFailover requires MultiAZ. The database then has an address in another zone.
RestoreDBInstanceFromDBSnapshot and RestoreDBInstanceToPointInTime make an instance without the source's security
  groups, parameter group, deletion protection, second zone, IAM authentication and managed master password.
Master user secrets contain the user and a password of the instance. RotateSecret changes the password.
CreateDBSubnetGroup requires two zones, and a subnet group or parameter group in use cannot be deleted.
ModifyDBParameterGroup refuses unknown parameters and those that RDS sets. ResetDBParameterGroup does not exist in moto.
DescribeDBEngineVersions does not exist in moto, and DescribeOrderableDBInstanceOptions only for Aurora.
"""

from __future__ import annotations

import json
import secrets
import string
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, Protocol

from moto.core.responses import ActionResult
from moto.core.utils import utcnow
from moto.ec2.models import ec2_backends
from moto.rds import urls as rds_urls
from moto.rds.exceptions import (
    DBParameterGroupNotFoundError,
    DBSnapshotNotFoundFault,
    InvalidParameterCombination,
    InvalidParameterValue,
    RDSClientError,
)
from moto.rds.models import DBInstance, DBSnapshot, MasterUserSecret, RDSBackend, rds_backends
from moto.rds.responses import RDSResponse
from moto.secretsmanager.models import SecretsManagerBackend

from scripts.local_cloud import ec2, rds_offers
from scripts.local_cloud.database_server import Configuration
from scripts.local_cloud.layout import ACCOUNT
from scripts.local_cloud.rds_offers import ENGINE

DEFERRED = {
    "db_instance_class": "DBInstanceClass",
    "allocated_storage": "AllocatedStorage",
    "engine_version": "EngineVersion",
    "multi_az": "MultiAZ",
    "port": "Port",
    "storage_type": "StorageType",
    "iops": "Iops",
}
"""Changes that wait for the maintenance window: argument → name in PendingModifiedValues."""

KEPT_AT_RESTORE = (
    *(
        "engine",
        "engine_version",
        "db_instance_class",
        "port",
        "allocated_storage",
        "storage_type",
        "storage_encrypted",
    ),
    *("iops", "kms_key_id", "master_username", "backup_retention_period", "copy_tags_to_snapshot", "license_model"),
    *("auto_minor_version_upgrade", "preferred_backup_window", "preferred_maintenance_window", "db_name"),
)
NEXT = {"creating": "available", "starting": "available", "modifying": "available", "rebooting": "available"}
NEXT |= {"stopping": "stopped"}


class Bodies(Protocol):
    """The real databases and copies of databases that RDS's records describe. The methods return at once."""

    def settle(self, resource: str) -> None: ...
    def copy(self, resource: str, snapshot: str) -> None: ...
    def forget_copy(self, snapshot: str) -> None: ...
    def problem(self) -> str | None: ...


_bodies: list[Bodies] = []


def bodies() -> Bodies:
    return _bodies[0]


class EmbodiedRDS(RDSBackend):
    """moto's RDS of one region. This object contains records only, so that it can be pickled."""

    @property
    def _url_module(self) -> ModuleType:
        return rds_urls

    # Instances

    def create_db_instance(self, db_kwargs: dict[str, Any]) -> DBInstance:
        wanted = dict(**db_kwargs)
        origin = wanted.pop("origin", {})
        if problem := bodies().problem():
            raise RDSClientError("InsufficientDBInstanceCapacity", problem)
        if wanted.get("engine") != ENGINE:
            raise InvalidParameterValue(f"the local cloud has no database for the engine {wanted.get('engine')}")
        wanted["engine_version"] = rds_offers.version(wanted.get("engine_version"))
        wanted["publicly_accessible"] = bool(wanted.get("publicly_accessible"))
        wanted.setdefault("license_model", "postgresql-license")
        rds_offers.require(wanted)
        self._require_parameter_group(wanted)
        if not origin:
            rds_offers.require_master(wanted)
        group = self._subnet_group(wanted)
        zones = sorted({subnet.availability_zone for subnet in group._subnets})
        wanted["availability_zone"] = wanted.get("availability_zone") or zones[0]
        if wanted["availability_zone"] not in zones:
            raise InvalidParameterCombination(
                f"The subnet group {group.name} has no subnet in {wanted['availability_zone']}"
            )
        ids = wanted.get("vpc_security_group_ids") or [self._ec2.get_default_security_group(group.vpc_id).id]
        wanted["vpc_security_group_ids"] = list(ids)
        self._require_groups(wanted["vpc_security_group_ids"], group.vpc_id)
        record: Any = super().create_db_instance(wanted)
        letters = string.ascii_uppercase + string.digits
        record.dbi_resource_id = "db-" + "".join(secrets.choice(letters) for _ in range(26))
        record.status, record.origin, record.fails_over, record.final_snapshot = "creating", origin, False, None
        record.pending_modified_values, record.new_password = {}, None
        self._take_address(record)
        bodies().settle(record.dbi_resource_id)
        return record  # type: ignore[no-any-return]

    def modify_db_instance(self, db_instance_identifier: str, db_kwargs: dict[str, Any]) -> DBInstance:
        record = self._in_state(db_instance_identifier, "available")
        wanted = {name: value for name, value in dict(**db_kwargs).items() if value is not None}
        if "db_port_number" in wanted:
            wanted["port"] = wanted.pop("db_port_number")
        wanted = {name: value for name, value in wanted.items() if name == "tags" or _differs(record, name, value)}
        if wanted.get("engine_version"):
            wanted["engine_version"] = rds_offers.version(wanted["engine_version"])
        after = {"engine_version": record.engine_version, "db_instance_class": record.db_instance_class, **wanted}
        if rds_offers.family(after["engine_version"]) != rds_offers.family(record.engine_version):
            raise InvalidParameterCombination("the local cloud does not upgrade databases to another major version")
        rds_offers.require(after, record.allocated_storage)
        self._require_parameter_group(after)
        if "vpc_security_group_ids" in wanted:
            self._require_groups(wanted["vpc_security_group_ids"], record.db_subnet_group.vpc_id)
        managed = wanted.get("manage_master_user_password", record.manage_master_user_password)
        if managed and wanted.get("master_user_password"):
            raise InvalidParameterCombination("MasterUserPassword cannot be set, because RDS manages the password")
        if wanted.get("manage_master_user_password") is False and not wanted.get("master_user_password"):
            raise InvalidParameterCombination("MasterUserPassword is required when RDS stops to manage the password")
        if wanted.get("apply_immediately"):
            pending = {name: record.pending_modified_values.pop(DEFERRED[name], None) for name in DEFERRED}
            wanted = {name: value for name, value in pending.items() if value is not None} | wanted
        else:
            for name in [name for name in DEFERRED if name in wanted]:
                record.pending_modified_values[DEFERRED[name]] = wanted.pop(name)
        super().modify_db_instance(db_instance_identifier, wanted)
        interface(record)._group_set = [self._ec2.get_security_group_from_id(g) for g in record.vpc_security_group_ids]
        password = wanted.get("manage_master_user_password") or wanted.get("master_user_password")
        record.new_password = master_password(record) if password else None
        record.status = "modifying"
        bodies().settle(record.dbi_resource_id)
        return record  # type: ignore[no-any-return]

    def reboot_db_instance(self, db_instance_identifier: str) -> DBInstance:
        record = self._in_state(db_instance_identifier, "available")
        record.fails_over = ec2.asked("ForceFailover")
        if record.fails_over:
            if not record.multi_az:
                raise InvalidParameterCombination(
                    f"{record.db_instance_identifier} cannot fail over, because it is not a Multi-AZ DB instance"
                )
            record.availability_zone = record.secondary_availability_zone
            self._return_address(record)
            self._take_address(record)
        record.status = "rebooting"
        bodies().settle(record.dbi_resource_id)
        return record  # type: ignore[no-any-return]

    def stop_db_instance(self, db_instance_identifier: str, db_snapshot_identifier: str | None = None) -> DBInstance:
        record: Any = super().stop_db_instance(db_instance_identifier, db_snapshot_identifier)
        record.status = "stopping"
        bodies().settle(record.dbi_resource_id)
        return record  # type: ignore[no-any-return]

    def start_db_instance(self, db_instance_identifier: str) -> DBInstance:
        record: Any = super().start_db_instance(db_instance_identifier)
        record.status = "starting"
        bodies().settle(record.dbi_resource_id)
        return record  # type: ignore[no-any-return]

    def delete_db_instance(
        self,
        db_instance_identifier: str,
        final_db_snapshot_identifier: str | None = None,
        skip_final_snapshot: bool | None = False,
        delete_automated_backups: bool | None = True,
    ) -> DBInstance:
        record: Any = self.describe_db_instances(db_instance_identifier)[0]
        if record.deletion_protection:
            raise InvalidParameterCombination(
                "Cannot delete protected DB Instance, please disable deletion protection and try again."
            )
        if bool(final_db_snapshot_identifier) == bool(skip_final_snapshot):
            raise InvalidParameterCombination(
                "FinalDBSnapshotIdentifier is required unless SkipFinalSnapshot is specified, and not both."
            )
        if record.status == "deleting":
            raise _wrong_state(record)
        if final_db_snapshot_identifier:
            snapshot: Any = super().create_db_snapshot(record.db_instance_identifier, final_db_snapshot_identifier)
            record.final_snapshot = _embody(snapshot)
        record.status = "deleting"
        bodies().settle(record.dbi_resource_id)
        return record  # type: ignore[no-any-return]

    def finish(self, record: Any, status: str) -> None:
        """Record that the database has done what the instance's state `status` required."""
        if record.status != status:  # another request has changed the state
            return
        record.status, record.new_password = NEXT.get(status, status), None
        if record.manage_master_user_password and record.master_user_secret._status == "creating":
            record.master_user_secret._status = "active"
        if status == "deleting":
            self._return_address(record)
            record.deletion_protection = False
            super().delete_db_instance(record.db_instance_identifier, skip_final_snapshot=True)

    def _in_state(self, identifier: str, status: str) -> Any:
        record = self.describe_db_instances(identifier)[0]
        if record.status != status:
            raise _wrong_state(record)
        return record

    def _require_parameter_group(self, wanted: dict[str, Any]) -> None:
        name, family = wanted.get("db_parameter_group_name"), rds_offers.family(wanted["engine_version"])
        if name and not name.startswith("default."):
            if name not in self.db_parameter_groups:
                raise DBParameterGroupNotFoundError(name)
            if self.db_parameter_groups[name].family != family:
                raise InvalidParameterCombination(f"The parameter group {name} does not belong to the family {family}")

    def _subnet_group(self, wanted: dict[str, Any]) -> Any:
        name = wanted.get("db_subnet_group_name")
        if not name:
            raise RDSClientError(
                "InvalidVPCNetworkStateFault", "the local cloud has no default subnet group: set DBSubnetGroupName"
            )
        return self.describe_db_subnet_groups(name)[0]

    def _require_groups(self, identifiers: list[str], vpc: str) -> None:
        for each in identifiers:
            group = self._ec2.get_security_group_from_id(each)
            if group is None or group.vpc_id != vpc:
                raise InvalidParameterCombination(
                    f"The DB instance and EC2 security group are in different VPCs: {each} is not in {vpc}."
                )

    # Network interfaces

    @property
    def _ec2(self) -> Any:
        backends: Any = ec2_backends[self.account_id]
        return backends[self.region_name]

    def _take_address(self, record: Any) -> None:
        subnets = record.db_subnet_group._subnets
        subnet = next(each for each in subnets if each.availability_zone == record.availability_zone)
        made = self._ec2.create_network_interface(
            subnet,
            subnet.get_available_subnet_ip(record.dbi_resource_id),
            group_ids=record.vpc_security_group_ids,
            description="RDSNetworkInterface",
        )
        made.requester_managed, made.requester_id, made.status = True, "amazon-rds", "in-use"
        record.interface = made.id

    def _return_address(self, record: Any) -> None:
        made = interface(record)
        made.subnet.del_subnet_ip(made.private_ip_address)
        self._ec2.delete_network_interface(made.id)

    # Snapshots

    def create_db_snapshot(self, *args: Any, **kwargs: Any) -> DBSnapshot:
        snapshot: Any = super().create_db_snapshot(*args, **kwargs)
        record = self.databases[snapshot.db_instance_identifier]
        if record.status not in ("available", "stopping", "stopped"):
            del self.database_snapshots[snapshot.db_snapshot_identifier]
            raise _wrong_state(record)
        bodies().copy(record.dbi_resource_id, _embody(snapshot))
        return snapshot  # type: ignore[no-any-return]

    def create_auto_snapshot(self, db_instance_identifier: str, db_snapshot_identifier: str) -> Any:
        """Do nothing for a new instance. databases.py creates automated snapshots with `create_automated_snapshot`."""

    def create_automated_snapshot(self, record: Any, *, start: bool = True) -> Any:
        """Record an automated snapshot. With `start`, also start the copy."""
        name = f"rds:{record.db_instance_identifier}-{utcnow():%Y-%m-%d-%H-%M-%S}"
        snapshot: Any = super().create_db_snapshot(record.db_instance_identifier, name, "automated")
        _embody(snapshot)
        if start:
            bodies().copy(record.dbi_resource_id, snapshot.body)
        return snapshot

    def copy_db_snapshot(self, *args: Any, **kwargs: Any) -> Any:
        raise InvalidParameterCombination("the local cloud does not copy snapshots of databases")

    def delete_db_snapshot(self, db_snapshot_identifier: str) -> DBSnapshot:
        snapshot: Any = super().delete_db_snapshot(db_snapshot_identifier)
        bodies().forget_copy(snapshot.body)
        return snapshot  # type: ignore[no-any-return]

    def restore_db_instance_from_db_snapshot(self, from_snapshot_id: str, overrides: dict[str, Any]) -> DBInstance:
        snapshot: Any = self.database_snapshots.get(from_snapshot_id.rpartition(":snapshot:")[2])
        if snapshot is None:
            raise DBSnapshotNotFoundFault(from_snapshot_id)
        if snapshot.status != "available":
            raise RDSClientError("InvalidDBSnapshotStateFault", f"The snapshot {from_snapshot_id} is {snapshot.status}")
        return self._restore(snapshot.database, snapshot, None, None, dict(**overrides))

    def restore_db_instance_to_point_in_time(
        self, source_db_identifier: str, target_db_identifier: str, overrides: dict[str, Any]
    ) -> DBInstance:
        source: Any = self.describe_db_instances(source_db_identifier)[0]
        asked = dict(**overrides)
        moment = asked.pop("restore_time", None)
        if bool(moment) == bool(asked.pop("use_latest_restorable_time", False)):
            raise InvalidParameterCombination("Exactly one of RestoreTime and UseLatestRestorableTime is required")
        if not source.backup_retention_period:
            raise RDSClientError("PointInTimeRestoreNotEnabledFault", "the backup retention period of the source is 0")
        until = _utc(moment) if moment else utcnow()
        ready = [each for each in automated_snapshots(source) if each.status == "available" and each.completed <= until]
        if until > utcnow() or not ready:
            raise RDSClientError(
                "InvalidRestoreFault", f"{source_db_identifier} cannot be restored to its state at {until:%FT%TZ}"
            )
        asked["db_instance_identifier"] = target_db_identifier
        return self._restore(source, ready[-1], source.dbi_resource_id, f"{until}+00" if moment else None, asked)

    def _restore(
        self, original: Any, snapshot: Any, source: str | None, until: str | None, asked: dict[str, Any]
    ) -> DBInstance:
        if asked["db_instance_identifier"] in self.databases:
            raise RDSClientError("DBInstanceAlreadyExistsFault", "DB instance already exists")
        if int(asked.get("allocated_storage") or original.allocated_storage) < original.allocated_storage:
            raise InvalidParameterValue("The allocated storage is smaller than that of the source")
        if asked.pop("manage_master_user_password", None):
            raise InvalidParameterCombination(f"ManageMasterUserPassword is not valid for a restore of {ENGINE}")
        kept = {name: getattr(original, name) for name in KEPT_AT_RESTORE}
        kept["db_subnet_group_name"] = original.db_subnet_group.name
        asked = {name: value for name, value in asked.items() if value is not None}
        origin = {"copy": snapshot.body, "source": source, "until": until}
        return self.create_db_instance(kept | asked | {"origin": origin})

    # Subnet groups and parameter groups

    def create_subnet_group(self, subnet_name: str, description: str, subnets: list[Any], tags: Any) -> Any:
        if subnet_name in self.subnet_groups:
            raise RDSClientError("DBSubnetGroupAlreadyExistsFault", f"The subnet group {subnet_name} already exists")
        rds_offers.require_zones(subnets)
        return super().create_subnet_group(subnet_name, description, subnets, tags)

    def modify_db_subnet_group(self, subnet_name: str, description: str, subnets: list[Any]) -> Any:
        rds_offers.require_zones(subnets)
        return super().modify_db_subnet_group(subnet_name, description, subnets)

    def delete_subnet_group(self, subnet_name: str) -> Any:
        if any(each.db_subnet_group.name == subnet_name.lower() for each in all_instances()):
            raise RDSClientError("InvalidDBSubnetGroupStateFault", f"A DB instance uses the subnet group {subnet_name}")
        return super().delete_subnet_group(subnet_name)

    def create_db_parameter_group(self, db_parameter_group_kwargs: dict[str, Any]) -> Any:
        rds_offers.require_family(str(db_parameter_group_kwargs.get("db_parameter_group_family")))
        return super().create_db_parameter_group(db_parameter_group_kwargs)

    def delete_db_parameter_group(self, db_parameter_group_name: str) -> Any:
        if any(each.db_parameter_group_name == db_parameter_group_name for each in all_instances()):
            raise RDSClientError(
                "InvalidDBParameterGroupStateFault", f"A DB instance uses the parameter group {db_parameter_group_name}"
            )
        return super().delete_db_parameter_group(db_parameter_group_name)

    def describe_db_parameter_groups(self, db_parameter_group_kwargs: dict[str, Any]) -> Any:
        found = super().describe_db_parameter_groups(db_parameter_group_kwargs)
        if (name := db_parameter_group_kwargs.get("db_parameter_group_name")) and not found:
            raise DBParameterGroupNotFoundError(name)
        return found

    def modify_db_parameter_group(self, db_parameter_group_name: str, db_parameter_group_parameters: Any) -> Any:
        if db_parameter_group_name not in self.db_parameter_groups:
            raise DBParameterGroupNotFoundError(db_parameter_group_name)
        given = [dict(each) for each in db_parameter_group_parameters]
        rds_offers.require_parameters(str(self.db_parameter_groups[db_parameter_group_name].family), given)
        group = super().modify_db_parameter_group(
            db_parameter_group_name, [{"Source": "user", "IsModifiable": True, **each} for each in given]
        )
        self.apply_parameters(db_parameter_group_name)
        return group

    def apply_parameters(self, group: str) -> None:
        """Let the instances of a parameter group read its parameters. Static parameters wait for a reboot."""
        for record in self.databases.values():
            if record.db_parameter_group_name == group and record.status == "available":
                bodies().settle(record.dbi_resource_id)

    def describe_orderable_db_instance_options(self, engine: str, engine_version: str) -> list[dict[str, Any]]:
        if engine != ENGINE:
            return super().describe_orderable_db_instance_options(engine, engine_version)
        return rds_offers.orderable_options(self.region_name, engine_version, ec2.parameter("DBInstanceClass"))


# Look-ups in the records of all regions. Callers must hold the API lock.


def _backends() -> Iterator[EmbodiedRDS]:
    backends: Any = rds_backends[ACCOUNT]
    yield from list(backends.values())


def all_instances() -> list[Any]:
    return [record for backend in _backends() for record in backend.databases.values()]


def all_snapshots() -> list[Any]:
    return [snapshot for backend in _backends() for snapshot in backend.database_snapshots.values()]


def find(resource: str) -> Any:
    """Return the record of the DB instance with this resource ID, or None."""
    return next((record for record in all_instances() if record.dbi_resource_id == resource), None)


def automated_snapshots(record: Any) -> list[Any]:
    """Return the automated snapshots of an instance, oldest first."""
    found = [each for each in all_snapshots() if each.dbi_resource_id == record.dbi_resource_id]
    return sorted((each for each in found if each.snapshot_type == "automated"), key=lambda each: each.created)


def interface(record: Any) -> Any:
    return record.backend._ec2.get_network_interface(record.interface)


def private_address(record: Any) -> str:
    return str(interface(record).private_ip_address)


def configuration(record: Any) -> Configuration:
    (group,) = record.db_parameter_groups()
    given = {name: each["ParameterValue"] for name, each in group.parameters.items() if "ParameterValue" in each}
    return Configuration(
        major=record.engine_version.partition(".")[0],
        port=int(record.port),
        memory_mib=rds_offers.memory_mib(record.db_instance_class),
        parameters=given,
        archives=bool(record.backup_retention_period),
        master=record.master_username,
    )


def master_password(record: Any) -> str | None:
    if record.manage_master_user_password:
        return str(json.loads(record.master_user_secret.secret.secret_string)["password"])
    password: str | None = getattr(record, "_master_user_password", None)
    return password


def generate_password() -> str:
    letters = string.ascii_letters + string.digits + "!#$%&()*+,-.:;<=>?[]^_{|}~"
    return "".join(secrets.choice(letters) for _ in range(28))


def secret_to_rotate(record: Any) -> Any:
    """Return the record of the master user's secret if its rotation was requested, otherwise None."""
    secret = getattr(record, "master_user_secret", None)
    return secret if secret is not None and secret._status == "rotating" else None


def finish_rotation(secret: Any, password: str) -> None:
    text = json.dumps({"username": secret.resource.master_username, "password": password})
    secret.secretsmanager.put_secret_value(secret.secret_arn, text, None, str(uuid.uuid4()), ["AWSCURRENT"])
    secret.secret, secret._status = secret.secretsmanager.secrets[secret.secret_arn], "active"


def _differs(record: Any, name: str, value: Any) -> bool:
    """Return whether an argument of ModifyDBInstance changes the record. moto does not return all attributes."""
    return name.startswith(("apply_", "new_", "master_user_password", "db_sub")) or getattr(record, name, None) != value


def _wrong_state(record: Any) -> RDSClientError:
    return RDSClientError(
        "InvalidDBInstanceStateFault", f"DB instance {record.db_instance_identifier} is in the state {record.status}."
    )


def _embody(snapshot: Any) -> str:
    """Give a new snapshot the name of its copy, and return the name."""
    snapshot.body, snapshot.status, snapshot.completed = uuid.uuid4().hex, "creating", None
    return str(snapshot.body)


def _utc(moment: Any) -> datetime:
    """Return a time without time zone in UTC, like moto's times."""
    parsed = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return parsed.astimezone(UTC).replace(tzinfo=None) if parsed.tzinfo else parsed


# Installation


def install(behind: Bodies) -> None:
    """Connect moto's RDS to the real databases. Call this function once, before any region is used."""
    _bodies[:] = [behind]
    rds_backends.backend = EmbodiedRDS
    replaced: dict[tuple[Any, str], Any] = {
        (DBInstance, "endpoint"): property(_endpoint),
        (DBInstance, "secondary_availability_zone"): property(_secondary_zone),
        (DBInstance, "default_db_parameter_group_details"): _default_group,
        (MasterUserSecret, "_generate_secret_string"): _secret_string,
        (MasterUserSecret, "secret_status"): property(lambda self: self._status),
        (MasterUserSecret, "rotate_secret"): _rotate,
        (SecretsManagerBackend, "rotate_secret"): _rotate_secret(SecretsManagerBackend.rotate_secret),
        (RDSResponse, "describe_db_engine_versions"): rds_offers.describe_versions,
        (RDSResponse, "reset_db_parameter_group"): _reset_group,
    }
    for (owner, name), value in replaced.items():
        setattr(owner, name, value)


def _endpoint(self: Any) -> dict[str, Any] | None:
    return (
        None
        if self.status == "creating"
        else {"Address": self.address, "Port": self.port, "HostedZoneId": "Z1RLNUO7B9Q6NB"}
    )


def _secondary_zone(self: Any) -> str | None:
    zones = {subnet.availability_zone for subnet in self.db_subnet_group._subnets}
    return str(min(zones - {self.availability_zone})) if self.multi_az else None


def _default_group(self: Any) -> tuple[str, str]:
    family = rds_offers.family(self.engine_version)
    return family, f"default.{family}"


def _secret_string(self: Any) -> str:
    return json.dumps({"username": self.resource.master_username, "password": generate_password()})


def _rotate(self: Any) -> None:
    self._status = "rotating"
    bodies().settle(self.resource.dbi_resource_id)


def _rotate_secret(original: Any) -> Any:
    def rotate(self: SecretsManagerBackend, secret_id: str, *args: Any, **kwargs: Any) -> Any:
        secret: Any = self.secrets[secret_id] if self._is_valid_identifier(secret_id) else None
        if secret is None or secret.owning_service != "rds":
            return original(self, secret_id, *args, **kwargs)
        for record in all_instances():
            if record.manage_master_user_password and record.master_user_secret.secret_arn == secret.arn:
                record.master_user_secret.rotate_secret()
        return secret.to_short_dict(version_id=secret.default_version_id)

    return rotate


def _reset_group(self: RDSResponse) -> ActionResult:
    backend: Any = self.backend
    name = self.params.get("DBParameterGroupName")
    (group,) = backend.describe_db_parameter_groups({"db_parameter_group_name": name})
    named = [each["ParameterName"] for each in self.params.get("Parameters", [])]
    for each in list(group.parameters) if self.params.get("ResetAllParameters") else named:
        group.parameters.pop(each, None)
    backend.apply_parameters(name)
    return ActionResult({"DBParameterGroupName": name})
