"""record_facts.py records the tables and migrations that `images.py diff` compares."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mlflow_host.bake import mlflow_migrations
from mlflow_host.schema import release_worker

STEP = Path(__file__).parents[2] / "provisioning" / "steps" / "record_facts.py"
SCHEMA = """
CREATE TABLE public.runs (
    run_uuid character varying(32) NOT NULL,
    "end" bigint,
    status character varying(9) DEFAULT 'a, b'::character varying,
    CONSTRAINT runs_lifecycle_stage CHECK (((lifecycle_stage)::text = ANY ((ARRAY['active'::character varying,
    'deleted'::character varying])::text[])))
);

ALTER TABLE public.runs OWNER TO mlflow;

CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE INDEX index_runs ON public.runs USING btree (run_uuid);
"""
"""As pg_restore --schema-only prints it."""


@pytest.fixture(scope="module")
def step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_facts", STEP)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_tables_and_columns_are_read_from_the_dumped_schema(step: ModuleType) -> None:
    assert step.tables(SCHEMA) == {"alembic_version": ["version_num"], "runs": ["run_uuid", "end", "status"]}


@pytest.mark.parametrize(("kernels", "ec2s"), [("aarch64", "arm64"), ("x86_64", "x86_64")])
def test_architecture_has_the_name_that_ec2_uses(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch, kernels: str, ec2s: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: kernels)
    assert step.architecture() == ec2s


def test_migrations_are_named_from_first_to_head(step: ModuleType) -> None:
    found, (head, count) = mlflow_migrations.titles(), step.migrations()
    assert (found[-1]["revision"], len(found)) == (head, count)
    assert {"revision": "451aebb31d03", "title": "add metric step"} in found
    assert all(each["title"] for each in found)


def test_values_that_mlflow_can_read_are_recorded_for_columns_with_an_enumeration() -> None:
    found = release_worker.enumerations()
    assert found["webhooks.status"] == ["ACTIVE", "DISABLED"]
    assert {"0", "1"} <= set(found["jobs.status"]), "an enumeration that is stored as a number"
    assert {"GLOBAL", "ENDPOINT"} <= set(found["budget_policies.target_scope"])
