"""What RDS offers for PostgreSQL, and the refusals of requests for anything else. The offered versions are those of
this host. The limits are in "DB instance classes" and "Amazon RDS DB instance storage" (RDS user guide)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moto.core.responses import PaginatedResult
from moto.ec2.models.instance_types import INSTANCE_TYPES
from moto.rds.exceptions import InvalidParameterCombination, InvalidParameterValue, RDSClientError
from moto.rds.responses import RDSResponse

from scripts.local_cloud import database_server

ENGINE = "postgres"
FAMILIES = ("t3", "t4g", "m5", "m6g", "m6i", "m7g", "m7i", "m8g", "r5", "r6g", "r6i", "r7g", "r7i", "r8g")
STORAGE_TYPES = ("gp2", "gp3", "io1", "io2")
MIN_GIB, MAX_GIB = 20, 65536
RESERVED_USERS = ("admin", "rdsadmin", "postgresql", "root")
SET_BY_RDS = {
    *("archive_command", "archive_library", "archive_mode", "archive_timeout", "config_file", "data_directory"),
    *("hba_file", "ident_file", "listen_addresses", "port", "primary_conninfo", "restore_command", "ssl_cert_file"),
    *("ssl_key_file", "ssl", "unix_socket_directories", "cluster_name", "external_pid_file", "fsync"),
}


def classes() -> list[str]:
    return [f"db.{name}" for name in INSTANCE_TYPES if name.partition(".")[0] in FAMILIES and "metal" not in name]


def memory_mib(instance_class: str) -> int:
    return int(INSTANCE_TYPES[instance_class.removeprefix("db.")]["MemoryInfo"]["SizeInMiB"])


def family(version: str) -> str:
    """Return the family of parameter groups of an engine version: "15.18" → "postgres15"."""
    return ENGINE + version.partition(".")[0]


def version(asked: str | None) -> str:
    """Return the offered version for a version or major version. Raises InvalidParameterCombination."""
    offered = database_server.versions()
    found = offered.get(asked, asked) if asked else list(offered.values())[-1]
    if found not in offered.values():
        raise InvalidParameterCombination(f"Cannot find version {asked} for {ENGINE}")
    return found


def require(wanted: Mapping[str, Any], gib_now: int = 0) -> None:
    """Refuse a request to create or modify an instance whose class, storage, retention or address is not offered.
    `gib_now` is the allocated storage of an existing instance, which can only grow by 10 percent or more."""
    if wanted.get("publicly_accessible"):
        raise InvalidParameterCombination("the local cloud has no public addresses for databases")
    if wanted["db_instance_class"] not in classes():
        raise InvalidParameterCombination(
            "RDS does not support creating a DB instance with the following combination: "
            f"DBInstanceClass={wanted['db_instance_class']}, Engine={ENGINE}, EngineVersion={wanted['engine_version']}"
        )
    if wanted.get("storage_type", "gp3") not in STORAGE_TYPES:
        raise InvalidParameterValue(f"Invalid storage type: {wanted['storage_type']}")
    gib, lowest = int(wanted.get("allocated_storage") or gib_now), max(MIN_GIB, -(-gib_now * 11 // 10))
    if gib != gib_now and not lowest <= gib <= MAX_GIB:
        raise InvalidParameterCombination(
            f"Invalid storage size for engine name {ENGINE}: {gib} GiB is not between {lowest} and {MAX_GIB} GiB"
        )
    if not 0 <= int(wanted.get("backup_retention_period", 1)) <= 35:
        raise InvalidParameterValue("the backup retention period must be between 0 and 35 days")


def require_master(wanted: Mapping[str, Any]) -> None:
    """Refuse a new instance without a valid master user, or without exactly one source of the master password."""
    user, password = str(wanted.get("master_username") or ""), str(wanted.get("master_user_password") or "")
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]{0,62}", user) or user.lower().startswith("pg_"):
        raise InvalidParameterValue(f"The parameter MasterUsername is not a valid identifier: {user!r}")
    if user.lower() in RESERVED_USERS:
        raise InvalidParameterValue(f"MasterUsername {user} cannot be used as it is a reserved word used by the engine")
    if bool(password) == bool(wanted.get("manage_master_user_password")):
        raise InvalidParameterCombination("Exactly one of MasterUserPassword and ManageMasterUserPassword is required")
    if password and (not re.fullmatch(r"[!-~]{8,128}", password) or set(password) & set("/@\"'")):
        raise InvalidParameterValue(
            "MasterUserPassword must have 8 to 128 printable ASCII characters without spaces, slashes, @ and quotes"
        )


def require_zones(subnets: Iterable[Any]) -> None:
    zones = sorted({subnet.availability_zone for subnet in subnets})
    if len(zones) < 2:
        raise RDSClientError(
            "DBSubnetGroupDoesNotCoverEnoughAZs",
            "The DB subnet group doesn't meet Availability Zone (AZ) coverage requirement. Current AZ coverage: "
            f"{', '.join(zones)}. Add subnets to cover at least 2 AZs.",
        )


def require_family(asked: str) -> None:
    if asked not in map(family, database_server.versions().values()):
        raise InvalidParameterValue(f"ParameterGroupFamily {asked} is not a valid parameter group family")


def require_parameters(group_family: str, given: Iterable[Mapping[str, Any]]) -> None:
    """Refuse parameters that PostgreSQL does not have, that RDS sets itself, or that have a formula as value."""
    known = database_server.parameters(group_family.removeprefix(ENGINE))
    for name, value in ((each["ParameterName"], str(each.get("ParameterValue"))) for each in given):
        if not name.startswith("rds.") and (name not in known or name in SET_BY_RDS):
            raise InvalidParameterValue(f"Could not find parameter with name: {name}")
        if "{" in value:
            raise InvalidParameterValue(f"the local cloud does not evaluate formulas of parameters: {name}={value}")


def orderable_options(region: str, engine_version: str | None, instance_class: str) -> list[dict[str, Any]]:
    """Return the answer of DescribeOrderableDBInstanceOptions, for all versions if the version is None, and for all
    classes if the class is ""."""
    zones = [{"Name": f"{region}{letter}"} for letter in "abc"]
    return [
        {
            "Engine": ENGINE,
            "EngineVersion": each,
            "DBInstanceClass": name,
            "LicenseModel": "postgresql-license",
            "AvailabilityZones": zones,
            "StorageType": storage,
            "MinStorageSize": MIN_GIB,
            "MaxStorageSize": MAX_GIB,
            "Vpc": True,
            "MultiAZCapable": True,
            "SupportsStorageEncryption": True,
            "SupportsIAMDatabaseAuthentication": True,
            "SupportsStorageAutoscaling": True,
            "SupportsIops": storage.startswith("io"),
        }
        for each in database_server.versions().values()
        if engine_version in (None, each)
        for name in classes()
        if instance_class in ("", name)
        for storage in STORAGE_TYPES
    ]


def describe_versions(self: RDSResponse) -> PaginatedResult:
    """Answer DescribeDBEngineVersions."""
    engine, asked = self._get_param("Engine"), self._get_param("EngineVersion")
    group_family = self._get_param("DBParameterGroupFamily")
    found = [
        {
            "Engine": ENGINE,
            "EngineVersion": each,
            "MajorEngineVersion": major,
            "DBParameterGroupFamily": family(each),
            "DBEngineDescription": "PostgreSQL",
            "DBEngineVersionDescription": f"PostgreSQL {each}",
            "Status": "available",
            "ValidUpgradeTarget": [],
            "SupportedCACertificateIdentifiers": ["rds-ca-rsa2048-g1"],
        }
        for major, each in database_server.versions().items()
        if engine in (None, ENGINE) and asked in (None, major, each) and group_family in (None, family(each))
    ]
    return PaginatedResult({"DBEngineVersions": found[-1:] if self._get_bool_param("DefaultOnly") else found})
