"""A DB instance of RDS is a real PostgreSQL server with RDS's rights, states, logins, snapshots and restores.

These tests use a cloud of their own, because a cloud that was made before databases has no certificate for them.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from botocore.exceptions import ClientError

from scripts.local_cloud import LocalCloud
from tests.support.databases import connected, described, master, running
from tests.support.leftovers import leftovers, orphaned_network_namespaces, running_processes

from .conftest import Account, create_key_pair, permission, wait_until
from .test_lifetime import kill_daemon, with_source_image

pytestmark = [pytest.mark.machine, pytest.mark.slow]


def policy(**statement: Any) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **statement}]})


@dataclass
class Network:
    """A VPC with two subnets in two zones, a subnet group of RDS, and a security group for databases."""

    vpc: str
    subnets: list[str]
    group: str


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    cloud, processes, namespaces = (
        LocalCloud(tmp_path_factory.mktemp("rds")),
        running_processes(),
        orphaned_network_namespaces(),
    )
    try:
        cloud.up()
        yield cloud
    finally:
        cloud.purge()
    left = [*leftovers(cloud.places.root, processes), *sorted(orphaned_network_namespaces() - namespaces)]
    assert not left
    assert not Path(cloud.places.root).exists()


@pytest.fixture(scope="module")
def network(own: LocalCloud) -> Network:
    ec2 = own.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.7.0.0/16")["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.7.{index}.0/24", AvailabilityZone=f"{own.region}{zone}")["Subnet"]
        for index, zone in enumerate("ab")
    ]
    group = ec2.create_security_group(GroupName="database", Description="database", VpcId=vpc)["GroupId"]
    ids = [subnet["SubnetId"] for subnet in subnets]
    own.client("rds").create_db_subnet_group(DBSubnetGroupName="own", DBSubnetGroupDescription="own", SubnetIds=ids)
    return Network(vpc, ids, group)


def settings(network: Network, **changed: Any) -> dict[str, Any]:
    """Return arguments of CreateDBInstance."""
    return {
        "Engine": "postgres",
        "DBInstanceClass": "db.t4g.micro",
        "AllocatedStorage": 20,
        "MasterUsername": "boss",
        "ManageMasterUserPassword": True,
        "DBSubnetGroupName": "own",
        "VpcSecurityGroupIds": [network.group],
        "BackupRetentionPeriod": 7,
        "EnableIAMDatabaseAuthentication": True,
        "StorageEncrypted": True,
        **changed,
    }


def wait_status(cloud: LocalCloud, identifier: str, status: str = "available") -> dict[str, Any]:
    """Wait for a state, and return the description of the instance. Fails at once if the instance has failed."""

    def reached() -> bool:
        now = described(cloud, identifier)["DBInstanceStatus"]
        assert now == status or now != "failed", cloud.places.log.read_text()[-2000:]
        return bool(now == status)

    wait_until(reached, 240, f"{identifier} is not {status}")
    return described(cloud, identifier)


def wait_snapshot(cloud: LocalCloud, snapshot: str) -> None:
    def available() -> bool:
        found = cloud.client("rds").describe_db_snapshots(DBSnapshotIdentifier=snapshot)["DBSnapshots"]
        return bool(found[0]["Status"] == "available")

    wait_until(available, 120, f"{snapshot} is not available")


@pytest.fixture(scope="module")
def instance(own: LocalCloud, network: Network) -> str:
    """Create the instance that most tests share, in two zones and with a database `mlflow`."""
    created = own.client("rds").create_db_instance(
        DBInstanceIdentifier="shared", **settings(network, MultiAZ=True, DBName="mlflow", DeletionProtection=True)
    )["DBInstance"]
    assert created["DBInstanceStatus"] == "creating"
    assert "Endpoint" not in created
    wait_status(own, "shared")
    return "shared"


def rows(cloud: LocalCloud, identifier: str, sql: str, **login: Any) -> list[tuple[Any, ...]]:
    """Run statements as the master user, and return the rows of the last one."""
    with connected(cloud, identifier, "mlflow", **(login or master(cloud, "shared"))) as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall()) if cursor.description else []


def delete(cloud: LocalCloud, identifier: str) -> None:
    cloud.client("rds").delete_db_instance(DBInstanceIdentifier=identifier, SkipFinalSnapshot=True)
    wait_until(lambda: not exists(cloud, identifier), 60, f"{identifier} is not deleted")


def exists(cloud: LocalCloud, identifier: str) -> bool:
    return any(each["id"] == identifier for each in cloud.status()["databases"])


def test_instance_has_a_private_address_of_its_subnet_group(own: LocalCloud, network: Network, instance: str) -> None:
    found = own.client("ec2").describe_network_interfaces(Filters=[{"Name": "vpc-id", "Values": [network.vpc]}])
    (interface,) = found["NetworkInterfaces"]
    assert interface["PrivateIpAddress"] == running(own, instance)["address"]
    assert (interface["Description"], interface["SubnetId"]) == ("RDSNetworkInterface", network.subnets[0])
    with pytest.raises(ClientError, match="DependencyViolation"):
        own.client("ec2").delete_security_group(GroupId=network.group)


def test_master_user_is_no_superuser(own: LocalCloud, instance: str) -> None:
    who = "SELECT current_user, rolsuper, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname = current_user"
    assert rows(own, instance, who) == [("boss", False, True, True)]
    assert rows(own, instance, "SET session_replication_role = replica; SHOW session_replication_role") == [
        ("replica",)
    ]
    for forbidden in (
        "CREATE ROLE other SUPERUSER",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "SELECT pg_read_file('/etc/passwd')",
        "ALTER SYSTEM SET work_mem = '1GB'",
        "ALTER ROLE rdsadmin PASSWORD 'x'",
        "DROP DATABASE rdsadmin",
    ):
        with pytest.raises(psycopg2.Error):
            rows(own, instance, forbidden)


def test_only_tls_with_the_endpoints_name_is_accepted(own: LocalCloud, instance: str) -> None:
    login = master(own, instance)
    with pytest.raises(psycopg2.OperationalError, match="no encryption"):
        rows(own, instance, "SELECT 1", **login, sslmode="disable")
    with pytest.raises(psycopg2.OperationalError, match="does not match host name"):
        rows(own, instance, "SELECT 1", **login, host="other.example.com")
    for user, database in (("rdsadmin", "mlflow"), ("boss", "rdsadmin")):
        with (
            pytest.raises(psycopg2.OperationalError, match="rejects connection"),
            connected(own, instance, database, **{**login, "user": user}),
        ):
            pass


def test_token_of_a_role_is_the_password_of_a_member_of_rds_iam(own: LocalCloud, instance: str) -> None:
    rows(own, instance, "CREATE ROLE by_token LOGIN; GRANT rds_iam TO by_token")
    facts = described(own, instance)
    iam, host = own.client("iam"), facts["Endpoint"]["Address"]
    trust = policy(Principal={"AWS": "*"}, Action="sts:AssumeRole")
    arn = iam.create_role(RoleName="reader", AssumeRolePolicyDocument=trust)["Role"]["Arn"]
    allowed = f"arn:aws:rds-db:{own.region}:123456789012:dbuser:{facts['DbiResourceId']}/by_token"
    session = own.client("sts").assume_role(RoleArn=arn, RoleSessionName="test")["Credentials"]
    keys = {
        "aws_access_key_id": session["AccessKeyId"],
        "aws_secret_access_key": session["SecretAccessKey"],
        "aws_session_token": session["SessionToken"],
    }

    def log_in(signed_for: str = "by_token") -> list[tuple[Any, ...]]:
        token = own.client("rds", **keys).generate_db_auth_token(host, 5432, signed_for)
        return rows(own, instance, "SELECT current_user", user="by_token", password=token)

    with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
        log_in()
    connect = policy(Action="rds-db:connect", Resource=allowed)
    iam.put_role_policy(RoleName="reader", PolicyName="connect", PolicyDocument=connect)
    assert log_in() == [("by_token",)]
    with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
        log_in("boss")
    with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
        rows(own, instance, "SELECT 1", user="by_token", password=master(own, instance)["password"])


def test_rotation_changes_the_password_and_the_secret(own: LocalCloud, instance: str) -> None:
    before, secret = master(own, instance), described(own, instance)["MasterUserSecret"]["SecretArn"]
    own.client("secretsmanager").rotate_secret(SecretId=secret)
    wait_until(lambda: master(own, instance) != before, 30, "the secret was not rotated")
    assert rows(own, instance, "SELECT 1", **master(own, instance)) == [(1,)]
    with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
        rows(own, instance, "SELECT 1", **before)
    assert described(own, instance)["MasterUserSecret"]["SecretStatus"] == "active"


def test_failover_moves_the_endpoint_to_another_address(own: LocalCloud, instance: str) -> None:
    rows(own, instance, "CREATE TABLE acknowledged (n int)")
    login, before = master(own, instance), running(own, instance)
    with connected(own, instance, "mlflow", **login) as cursor:
        for number in range(50):
            cursor.execute(f"INSERT INTO acknowledged VALUES ({number})")
        own.client("rds").reboot_db_instance(DBInstanceIdentifier=instance, ForceFailover=True)
        wait_status(own, instance)
        with pytest.raises(psycopg2.Error):
            cursor.execute("SELECT 1")
    after = running(own, instance)
    assert after["name"] == before["name"]
    assert after["address"] != before["address"]
    assert after["pid"] != before["pid"]
    zones = {described(own, instance)[zone] for zone in ("AvailabilityZone", "SecondaryAvailabilityZone")}
    assert zones == {f"{own.region}a", f"{own.region}b"}
    assert rows(own, instance, "SELECT count(*) FROM acknowledged") == [(50,)]


def test_restores_have_the_data_of_their_moment(own: LocalCloud, network: Network, instance: str) -> None:
    rds, options = own.client("rds"), {"VpcSecurityGroupIds": [network.group], "DBSubnetGroupName": "own"}
    rows(own, instance, "CREATE TABLE history (n int); INSERT INTO history VALUES (1)")
    rds.create_db_snapshot(DBInstanceIdentifier=instance, DBSnapshotIdentifier="one")
    wait_snapshot(own, "one")
    rows(own, instance, "INSERT INTO history VALUES (2)")
    time.sleep(1.1)  # RestoreTime has whole seconds
    ((moment,),) = rows(own, instance, "SELECT clock_timestamp()")
    time.sleep(1.1)
    rows(own, instance, "INSERT INTO history VALUES (3)")
    rds.restore_db_instance_from_db_snapshot(DBInstanceIdentifier="snap", DBSnapshotIdentifier="one", **options)
    times = {"moment": {"RestoreTime": moment}, "newest": {"UseLatestRestorableTime": True}}
    for name, until in times.items():
        rds.restore_db_instance_to_point_in_time(
            SourceDBInstanceIdentifier=instance, TargetDBInstanceIdentifier=name, **until, **options
        )
    for name, expected in {"snap": [1], "moment": [1, 2], "newest": [1, 2, 3]}.items():
        facts = wait_status(own, name)
        assert [n for (n,) in rows(own, name, "SELECT n FROM history ORDER BY n")] == expected
        assert not facts["DeletionProtection"]
        assert "MasterUserSecret" not in facts
        rows(own, name, "INSERT INTO history VALUES (4)")
        delete(own, name)
    assert rows(own, instance, "SELECT count(*) FROM history") == [(3,)]


def test_modifications_apply_at_once_or_wait(own: LocalCloud, network: Network) -> None:
    rds = own.client("rds")
    rds.create_db_parameter_group(DBParameterGroupName="small", DBParameterGroupFamily=family(own), Description="small")
    changes = [{"ParameterName": "statement_timeout", "ParameterValue": "1234", "ApplyMethod": "immediate"}]
    rds.modify_db_parameter_group(DBParameterGroupName="small", Parameters=changes)
    password = {"ManageMasterUserPassword": False, "MasterUserPassword": "first-password"}
    chosen = settings(network, **password, DBName="mlflow", Port=6543, DBParameterGroupName="small")
    rds.create_db_instance(DBInstanceIdentifier="changed", **chosen)
    wait_status(own, "changed")
    login = {"user": "boss", "password": "first-password"}
    assert rows(own, "changed", "SHOW statement_timeout", **login) == [("1234ms",)]
    pending = rds.modify_db_instance(DBInstanceIdentifier="changed", DBInstanceClass="db.t4g.small")["DBInstance"]
    assert pending["PendingModifiedValues"] == {"DBInstanceClass": "db.t4g.small"}
    wait_status(own, "changed")
    assert rows(own, "changed", "SHOW max_connections", **login) == [("112",)]
    rds.modify_db_instance(
        DBInstanceIdentifier="changed", MasterUserPassword="second-password", DBPortNumber=6544, ApplyImmediately=True
    )
    facts = wait_status(own, "changed")
    assert (facts["DBInstanceClass"], facts["Endpoint"]["Port"]) == ("db.t4g.small", 6544)
    login["password"] = "second-password"
    assert rows(own, "changed", "SHOW max_connections", **login) == [("225",)]
    rds.reset_db_parameter_group(DBParameterGroupName="small", ResetAllParameters=True)
    reset = [("0",)]
    wait_until(lambda: rows(own, "changed", "SHOW statement_timeout", **login) == reset, 20, "the old timeout is there")
    rds.modify_db_instance(DBInstanceIdentifier="changed", ManageMasterUserPassword=True, ApplyImmediately=True)
    wait_status(own, "changed")
    assert rows(own, "changed", "SELECT 1", **master(own, "changed")) == [(1,)]
    delete(own, "changed")
    rds.delete_db_parameter_group(DBParameterGroupName="small")


def test_deletion_leaves_only_the_final_snapshot(own: LocalCloud, network: Network) -> None:
    rds, secrets = own.client("rds"), own.client("secretsmanager")
    rds.create_db_instance(DBInstanceIdentifier="gone", **settings(network, DBName="mlflow"))
    secret = wait_status(own, "gone")["MasterUserSecret"]["SecretArn"]
    login, pid = master(own, "gone"), running(own, "gone")["pid"]
    rows(own, "gone", "CREATE TABLE kept AS SELECT 7 AS n", **login)
    with pytest.raises(ClientError, match="InvalidParameterCombination"):
        rds.delete_db_instance(DBInstanceIdentifier="gone")
    rds.delete_db_instance(DBInstanceIdentifier="gone", FinalDBSnapshotIdentifier="last")
    wait_until(lambda: not exists(own, "gone"), 60, "the instance is not deleted")
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(ClientError, match="ResourceNotFoundException"):
        secrets.get_secret_value(SecretId=secret)
    wait_snapshot(own, "last")
    rds.restore_db_instance_from_db_snapshot(
        DBInstanceIdentifier="back", DBSnapshotIdentifier="last", DBSubnetGroupName="own"
    )
    wait_status(own, "back")
    assert rows(own, "back", "SELECT n FROM kept", **login) == [(7,)]
    delete(own, "back")


def family(cloud: LocalCloud) -> str:
    (found,) = cloud.client("rds").describe_db_engine_versions(Engine="postgres", DefaultOnly=True)["DBEngineVersions"]
    return str(found["DBParameterGroupFamily"])


REFUSALS: list[tuple[str, str, dict[str, Any]]] = [
    ("create_db_instance", "InvalidParameterCombination", {"DBInstanceClass": "db.x1.tiny"}),
    ("create_db_instance", "InvalidParameterCombination", {"EngineVersion": "9.6"}),
    ("create_db_instance", "InvalidParameterCombination", {"AllocatedStorage": 5}),
    ("create_db_instance", "InvalidParameterCombination", {"MasterUserPassword": "also-a-password"}),
    ("create_db_instance", "InvalidParameterCombination", {"VpcSecurityGroupIds": ["sg-12345678"]}),
    ("create_db_instance", "InvalidParameterCombination", {"PubliclyAccessible": True}),
    ("create_db_instance", "InvalidParameterValue", {"MasterUsername": "rdsadmin"}),
    ("create_db_instance", "InvalidParameterValue", {"BackupRetentionPeriod": 36}),
    ("create_db_instance", "DBSubnetGroupNotFoundFault", {"DBSubnetGroupName": "other"}),
    ("create_db_instance", "DBParameterGroupNotFound", {"DBParameterGroupName": "other"}),
    ("create_db_instance", "DBInstanceAlreadyExists", {"DBInstanceIdentifier": "shared"}),
    ("modify_db_instance", "InvalidParameterCombination", {"AllocatedStorage": 19}),
    ("modify_db_instance", "InvalidParameterCombination", {"AllocatedStorage": 21}),
    ("modify_db_instance", "InvalidParameterCombination", {"DBInstanceClass": "db.x1.tiny"}),
    ("modify_db_instance", "InvalidParameterCombination", {"MasterUserPassword": "a-password"}),
    ("delete_db_instance", "InvalidParameterCombination", {"SkipFinalSnapshot": True}),
    ("start_db_instance", "InvalidDBInstanceState", {}),
]


@pytest.mark.parametrize(("operation", "code", "changed"), REFUSALS)
def test_request_that_rds_refuses_is_refused(
    own: LocalCloud, network: Network, instance: str, operation: str, code: str, changed: dict[str, Any]
) -> None:
    if operation == "create_db_instance":
        changed = settings(network, DBInstanceIdentifier="refused") | changed
    call: Callable[..., Any] = getattr(own.client("rds"), operation)
    with pytest.raises(ClientError) as caught:
        call(**{"DBInstanceIdentifier": instance, **changed})
    assert caught.value.response["Error"]["Code"] == code
    assert [each["id"] for each in own.status()["databases"]] == [instance]


def test_preflight_sees_versions_classes_and_storage(own: LocalCloud) -> None:
    rds = own.client("rds")
    (offered,) = rds.describe_db_engine_versions(Engine="postgres", DefaultOnly=True)["DBEngineVersions"]
    asked = {"Engine": "postgres", "EngineVersion": offered["EngineVersion"]}
    for name, found in {"db.m7g.large": True, "db.x1.tiny": False}.items():
        answer = rds.describe_orderable_db_instance_options(**asked, DBInstanceClass=name)
        options = {each["StorageType"]: each for each in answer["OrderableDBInstanceOptions"]}
        assert ("gp3" in options) is found
        assert all(option["SupportsIAMDatabaseAuthentication"] for option in options.values())
    assert rds.describe_db_engine_versions(Engine="postgres", EngineVersion="9.6")["DBEngineVersions"] == []


def test_stopped_instance_starts_with_its_data(own: LocalCloud, instance: str) -> None:
    rds = own.client("rds")
    rows(own, instance, "CREATE TABLE before_stop AS SELECT 1 AS n")
    rds.stop_db_instance(DBInstanceIdentifier=instance)
    wait_status(own, instance, "stopped")
    assert running(own, instance)["pid"] is None
    rds.start_db_instance(DBInstanceIdentifier=instance)
    wait_status(own, instance)
    assert rows(own, instance, "SELECT n FROM before_stop") == [(1,)]


def test_killed_server_starts_again(own: LocalCloud, instance: str) -> None:
    pid = running(own, instance)["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: running(own, instance)["pid"] not in (None, pid), 60, "the server did not start again")
    assert rows(own, instance, "SELECT 1") == [(1,)]


def test_server_outlives_a_killed_daemon(own: LocalCloud, instance: str) -> None:
    pid = running(own, instance)["pid"]
    kill_daemon(own)
    assert Path(f"/proc/{pid}").exists()
    own.up()
    wait_until(lambda: running(own, instance)["pid"] == pid, 30, "the server was not taken over")
    host = described(own, instance)["Endpoint"]["Address"]
    token = own.client("rds").generate_db_auth_token(host, 5432, "after_kill")
    rows(own, instance, "CREATE ROLE after_kill LOGIN; GRANT rds_iam TO after_kill")
    assert rows(own, instance, "SELECT 1", user="after_kill", password=token) == [(1,)]


def test_data_survives_down_and_up(own: LocalCloud, instance: str) -> None:
    rows(own, instance, "CREATE TABLE before_down AS SELECT 1 AS n")
    before = running(own, instance)
    own.down()
    assert not Path(f"/proc/{before['pid']}").exists()
    own.up()
    wait_until(lambda: running(own, instance)["pid"] is not None, 60, "the server did not start")
    assert running(own, instance)["address"] == before["address"]
    assert rows(own, instance, "SELECT n FROM before_down") == [(1,)]


def test_machine_connects_by_name_if_the_security_group_allows_it(
    own: LocalCloud, cloud: LocalCloud, network: Network, instance: str, tmp_path: Path
) -> None:
    account = Account(with_source_image(own, cloud), *create_key_pair(own, tmp_path))
    ec2, name = own.client("ec2"), running(own, instance)["name"]
    group = ec2.create_security_group(GroupName="machine", Description="machine", VpcId=network.vpc)["GroupId"]
    machine = account.launch(group, SubnetId=network.subnets[1])
    assert running(own, instance)["address"] in account.run(machine, f"getent ahostsv4 {name}")
    probe = (
        f"timeout 3 python3 -c 'import socket; print(socket.create_connection((\"{name}\", 5432)).getsockname()[0])'"
    )
    assert account.run(machine, f"{probe} || echo $?") == "124", "packets to a closed port get no answer"
    rule = permission(5432, "0.0.0.0/0") | {"IpRanges": [], "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=network.group, IpPermissions=[rule])
    assert account.run(machine, probe) == account.describe(machine)["PrivateIpAddress"]
    own.client("rds").reboot_db_instance(DBInstanceIdentifier=instance, ForceFailover=True)
    wait_status(own, instance)
    assert running(own, instance)["address"] in account.run(machine, f"getent ahostsv4 {name}")
    wait_until(lambda: account.run(machine, f"{probe} || echo no") != "no", 20, "the machine lost the database")
    ec2.revoke_security_group_ingress(GroupId=network.group, IpPermissions=[rule])
    assert account.run(machine, f"{probe} || echo $?") == "124"
