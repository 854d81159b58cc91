"""Create the two roles on a PostgreSQL server of another host with the master user's login. Idempotent.

    mlflow        owns MLflow's tables; the server's processes log in as this role
    mlflow_host   boot steps, dumps, adoption, garbage collection and the monitor log in as this role

The master user of Amazon RDS is no superuser. It has CREATEROLE and CREATEDB, and is a member of rds_superuser, which
may grant the roles in `GRANTED`. Nothing needs the parameter session_replication_role: RDS lets only members of
rds_superuser set it, and a grant of this parameter has blocked upgrades of RDS's major version.

A direct or indirect member of rds_iam can log in only with a token. Since PostgreSQL 16, the creator of a role is a
member of it, so the master user may no longer log in with its password after the creation. Therefore `are_complete`
checks the roles without the master's login.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psycopg2
from psycopg2 import errors, sql

from mlflow_host.machine.status import StepFailed
from mlflow_host.postgres.cluster import Cluster, connection, rows, run, value
from mlflow_host.postgres.reader_role import verifier

OWNER = "mlflow"
HOST = "mlflow_host"

GRANTED = (OWNER, "pg_signal_backend", "pg_monitor")
"""The roles of which mlflow_host is a member: to change MLflow's tables, to end sessions on a database before its copy
or rename, and to see the sessions and sizes of all databases."""

IAM = "rds_iam"
"""Members of this role of Amazon RDS log in with a token instead of a password."""


def are_complete(cluster: Cluster, *, tokens: bool) -> bool:
    """Whether both roles can log in with the passwords of `cluster`, and have all rights. With `tokens`, the passwords
    are tokens. Returns False, too, if the server does not answer."""
    granted = "SELECT bool_and(pg_has_role(%s, role, 'USAGE')) FROM unnest(%s::text[]) role"
    iam = "SELECT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = %s AND pg_has_role(%s, oid, 'MEMBER'))"
    try:
        with connection(replace(cluster, user=OWNER)), connection(replace(cluster, user=HOST)) as opened:
            creates = value(opened, "SELECT rolcreatedb FROM pg_roles WHERE rolname = user")
            has_all = value(opened, granted, (HOST, list(GRANTED)))
            return bool(creates and has_all and value(opened, iam, (IAM, OWNER)) == tokens)
    except psycopg2.OperationalError:
        return False


def create_roles(master: Cluster, passwords: Mapping[str, str] | None) -> None:
    """Create the roles, and mend attributes and memberships that differ. `passwords` contains each role's password, or
    is None for IAM authentication. Raises StepFailed if the master user lacks a right, and psycopg2.Error."""
    with connection(master) as opened:
        run(opened, "SELECT pg_advisory_xact_lock(hashtext('mlflow-host roles'))")
        if not value(opened, "SELECT rolsuper OR rolcreaterole AND rolcreatedb FROM pg_roles WHERE rolname = user"):
            raise StepFailed(
                f"the user {master.user} of {master.host} may not create roles and databases: use the master user that "
                "Amazon RDS created, or give this user CREATEROLE and CREATEDB"
            )
        for role in (OWNER, HOST):
            _create(opened, master, role)
        for group in GRANTED:
            _make_member(opened, master, HOST, group)
        for role in (OWNER, HOST):
            if passwords is None:
                _make_member(opened, master, role, IAM)
            else:
                _use_password(opened, master, role, passwords[role])


def _exists(opened: Any, role: str) -> bool:
    return bool(value(opened, "SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)))


def _create(opened: Any, master: Cluster, role: str) -> None:
    wanted = {"rolcanlogin": "LOGIN", "rolinherit": "INHERIT"} | ({"rolcreatedb": "CREATEDB"} if role == HOST else {})
    found = rows(opened, f"SELECT {', '.join(wanted)} FROM pg_roles WHERE rolname = %s", (role,))
    if not found:
        _execute(opened, master, f"CREATE ROLE {{}} {' '.join(wanted.values())}", role)
    elif missing := [word for word, there in zip(wanted.values(), found[0], strict=True) if not there]:
        _execute(opened, master, f"ALTER ROLE {{}} {' '.join(missing)}", role)


def _make_member(opened: Any, master: Cluster, role: str, group: str) -> None:
    if not _exists(opened, group):
        raise StepFailed(f"{master.host} has no role {group}: IAM authentication exists only on Amazon RDS and Aurora")
    if not value(opened, "SELECT pg_has_role(%s, %s, 'USAGE')", (role, group)):
        _execute(opened, master, "GRANT {} TO {}", group, role)


def _use_password(opened: Any, master: Cluster, role: str, password: str) -> None:
    """Set the password's SCRAM verifier, so that the password itself is not in the server's log. A member of rds_iam
    cannot log in with a password."""
    member = "SELECT pg_has_role(%s, %s, 'MEMBER')"
    if _exists(opened, IAM) and value(opened, member, (role, IAM)):
        _execute(opened, master, "REVOKE {} FROM {}", IAM, role)
        if value(opened, member, (role, IAM)):
            raise StepFailed(
                f"the role {role} of {master.host} is a member of {IAM} by a grant of another user: revoke the grant"
            )
    _execute(opened, master, "ALTER ROLE {} PASSWORD %s", role, parameters=(verifier(password, os.urandom(16)),))


def _execute(opened: Any, master: Cluster, statement: str, *names: str, parameters: Any = None) -> None:
    try:
        run(opened, sql.SQL(statement).format(*map(sql.Identifier, names)), parameters)
    except errors.InsufficientPrivilege as error:
        reason = str(error).splitlines()[0]
        raise StepFailed(
            f"the user {master.user} of {master.host} may not execute {statement.format(*names)} ({reason}): use the "
            "master user that Amazon RDS created"
        ) from None
