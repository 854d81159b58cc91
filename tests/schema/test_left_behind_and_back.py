"""If an older release cannot read or store a row, the carry leaves the row behind and names the row in a report. The
older release works with the carried rows, and an upgrade to the newer release restores the rows that were left
behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.boot import database
from mlflow_host.postgres import ownership
from mlflow_host.postgres.cluster import Cluster, connection, create_empty, drop, rows
from mlflow_host.schema import state
from mlflow_host.schema.copying import carry
from mlflow_host.schema.release import release
from scripts import lock
from tests.schema.environments import image, releases
from tests.schema.private_cluster import private_cluster
from tests.schema.run_in_release import in_release

pytestmark = pytest.mark.slow
OLDER, MIDDLE, LAST, NEWEST = releases()[1], *releases()[-3:]


class Server:
    """A database whose schema is changed by images of several releases, one after the other."""

    def __init__(self, cluster: Cluster, reports: Path) -> None:
        self.cluster, self._reports = cluster, reports

    def pin(self, version: str) -> dict[str, Any]:
        """Run the database step of an image of this release, and return the step's report."""
        settings = state.ChangeSettings(self.cluster, image(version), self._reports, dump=None)
        before = set(self._reports.glob("*.json"))
        database.bring(settings, print)
        (report,) = set(self._reports.glob("*.json")) - before
        return dict(json.loads(report.read_text()))

    def run(self, version: str, statements: str) -> Any:
        return in_release(image(version), self.cluster, statements)

    def sql(self, statements: str, name: str = "") -> list[tuple[Any, ...]]:
        """Run SQL in the database `name`, or in the database in service, and return the rows of the last statement."""
        with connection(self.cluster, name or self.cluster.database) as opened:
            return rows(opened, statements)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with private_cluster() as owned:
        yield Server(owned.cluster, tmp_path)


def left(report: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Return the number of rows and the reason for each table and column that a carry left behind."""
    return {f"{each['table']}.{each['column']}": (each["count"], each["reason"]) for each in report["left"]}


BUDGETS = """
from mlflow.entities import gateway_budget_policy as b
def budget(scope, target):
    return tracking.create_budget_policy(b.BudgetUnit.USD, 5, b.BudgetDuration(b.BudgetDurationUnit.DAYS, 7),
        b.BudgetTargetScope[scope], b.BudgetAction.REJECT, target_value=target).budget_policy_id
from mlflow.entities.gateway_endpoint import GatewayEndpointModelConfig, GatewayModelLinkageType
secret = tracking.create_gateway_secret("key", {"api_key": "sk-0123456789"}, "openai", None, "ann")
model = tracking.create_gateway_model_definition("model", secret.secret_id, "openai", "gpt-x", "ann")
config = GatewayEndpointModelConfig(model.model_definition_id, GatewayModelLinkageType.PRIMARY, 1.0)
endpoint = tracking.create_gateway_endpoint("endpoint", [config], "ann").endpoint_id
result = [budget("GLOBAL", None), budget("GLOBAL", None), budget("ENDPOINT", endpoint)]
for name in ("done", "lost"):
    jobs().start_job(jobs().create_job(name, "{}").job_id)
"""
LIST = "result = sorted(each.budget_policy_id for each in tracking.list_budget_policies())"
JOBS = "result = sorted(each.job_name + ' ' + each.status.name for each in jobs().list_jobs())"


@pytest.mark.parametrize("through", [(OLDER,), (MIDDLE, OLDER, MIDDLE)])
def test_values_that_only_the_newer_release_can_read_wait_for_it(server: Server, through: tuple[str, ...]) -> None:
    server.pin(NEWEST)
    kept, deleted, of_endpoint = server.run(NEWEST, BUDGETS)
    server.sql("UPDATE jobs SET status = 6 WHERE job_name = 'lost'")
    assert server.run(NEWEST, JOBS) == ["done RUNNING", "lost NEEDS_RECOVERY"]
    for version in through:
        report = server.pin(version)
        assert not report["unread"]
        if version == OLDER:
            assert server.run(OLDER, LIST) == sorted([kept, deleted])
            assert server.run(OLDER, JOBS) == ["done RUNNING"]
            server.run(OLDER, f"tracking.delete_budget_policy({deleted!r})")
            if through == (OLDER,):
                assert left(report)["budget_policies.target_scope"] == (1, "this release cannot read ENDPOINT")
                assert left(report)["jobs.status"] == (1, "this release cannot read 6")
    server.pin(NEWEST)
    assert server.run(NEWEST, LIST) == sorted([kept, of_endpoint])
    assert server.run(NEWEST, JOBS) == ["done RUNNING", "lost NEEDS_RECOVERY"]


def test_object_that_no_release_can_read_is_named_and_refuses_nothing(server: Server) -> None:
    server.pin(NEWEST)
    experiment = server.run(NEWEST, "result = tracking.create_experiment('kept')")
    server.sql(
        "INSERT INTO webhooks (webhook_id, name, url, status, creation_timestamp, last_updated_timestamp, workspace) "
        "VALUES ('wh', 'hook', 'https://example.com', 'ACTIVE', 1, 1, 'default');"
        "INSERT INTO webhook_events (webhook_id, entity, action) VALUES ('wh', 'prompt', 'exceeded')"
    )
    report = server.pin(OLDER)
    assert sorted(named.split(" (")[0] for named in report["unread"]) == [
        "webhook_events: wh/prompt/exceeded",
        "webhooks: wh",
    ]
    assert server.run(OLDER, f"result = tracking.get_experiment('{experiment}').name") == "kept"


LABELS = """
from mlflow.genai import label_schemas, review_queues
experiment = tracking.create_experiment("labelled")
schema = tracking.create_label_schema(experiment, name="label", type=label_schemas.LabelSchemaType.FEEDBACK,
    input=label_schemas.InputPassFail("yes", "no"), instruction="look")
queue = tracking.create_review_queue(experiment, name="queue", queue_type=review_queues.ReviewQueueType.CUSTOM,
    users=["ann"], schema_ids=[schema.schema_id])
def trace(name):
    client = mlflow.MlflowClient(uri)
    span = client.start_trace(name, experiment_id=experiment)
    client.end_trace(span.trace_id)
    return span.trace_id
traces = [trace("stays"), trace("goes")]
tracking.add_items_to_review_queue(queue.queue_id, item_ids=traces)
result = [experiment, queue.queue_id, *traces]
"""


def test_kept_database_dropped_in_the_middle_loses_nothing_that_the_newest_holds(server: Server) -> None:
    server.pin(NEWEST)
    experiment, queue, *traces = server.run(NEWEST, LABELS)
    server.pin(MIDDLE)
    dropped = server.pin(OLDER)["kept_database"]
    drop(server.cluster, dropped)
    report = server.pin(NEWEST)
    assert any(dropped in note and "no longer exists" in note for note in report["notes"])
    found = server.run(
        NEWEST,
        f"result = [[each.name for each in tracking.list_label_schemas('{experiment}')], "
        f"sorted(each.item_id for each in tracking.list_review_queue_items('{queue}'))]",
    )
    assert "label" in found[0] and found[1] == sorted(traces)


def test_review_queue_gets_no_item_back_whose_trace_was_deleted(server: Server) -> None:
    server.pin(NEWEST)
    experiment, queue, stays, goes = server.run(NEWEST, LABELS)
    server.pin(OLDER)
    server.run(OLDER, f"tracking.delete_traces('{experiment}', trace_ids=['{goes}'])")
    report = server.pin(NEWEST)
    found = server.run(NEWEST, f"result = [each.item_id for each in tracking.list_review_queue_items('{queue}')]")
    assert found == [stays]
    (items,) = [
        each for found in report["returned"].values() for each in found if each["table"] == "review_queue_items"
    ]
    assert (items["rows"], items["dropped"]) == (1, 1)


def test_row_whose_name_was_taken_meanwhile_stays_in_its_kept_database_and_is_named(server: Server) -> None:
    """The older release cannot read an endpoint, and a user of that release creates an endpoint with the same name."""
    server.pin(NEWEST)
    server.run(NEWEST, BUDGETS)
    server.sql("UPDATE endpoints SET routing_strategy = 'TO_COME'")
    server.pin(OLDER)
    taken = server.run(
        OLDER,
        """
from mlflow.entities.gateway_endpoint import GatewayEndpointModelConfig, GatewayModelLinkageType
(model,) = tracking.list_gateway_model_definitions()
config = GatewayEndpointModelConfig(model.model_definition_id, GatewayModelLinkageType.PRIMARY, 1.0)
result = tracking.create_gateway_endpoint("endpoint", [config], "bob").endpoint_id
""",
    )
    report = server.pin(NEWEST)
    ((kept, merged),) = report["returned"].items()
    (endpoints,) = [each for each in merged if each["table"] == "endpoints"]
    ((waits,),) = server.sql("SELECT endpoint_id FROM endpoints", kept)
    assert (endpoints["rows"], endpoints["refused"], endpoints["refused_keys"]) == (0, 1, [waits])
    assert any(kept in note and waits in note for note in report["notes"])
    assert server.sql("SELECT endpoint_id FROM endpoints") == [(taken,)]
    with connection(server.cluster) as opened:
        record = ownership.read(opened, server.cluster.database)
    assert record and record.needed == {kept}
    server.pin(OLDER)
    with connection(server.cluster) as opened:
        record = ownership.read(opened, server.cluster.database)
    assert record and kept in record.needed, "later steps keep it, too"


TRACED = """
experiment = tracking.create_experiment("traced")
client = mlflow.MlflowClient(uri)
span = client.start_trace("the name", experiment_id=experiment)
inner = client.start_span("llm", span.trace_id, span.span_id, span_type="CHAT_MODEL")
inner.set_attribute("mlflow.llm.model", "model-a")
inner.set_attribute("mlflow.llm.provider", "provider-b")
inner.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18})
inner.set_attribute("mlflow.llm.cost", {"input_cost": 0.25, "output_cost": 0.5, "total_cost": 0.75})
client.end_span(span.trace_id, inner.span_id)
client.end_trace(span.trace_id)
jobs().create_job("a job", "{}")
result = span.trace_id
"""
OLD_SCHEMAS = {
    "0584bdc529eb": "2.22",
    "b7c8d9e0f1a2": "the last one before jobs.function_fullname was renamed, with trace_metrics",
}


@pytest.mark.parametrize("revision", OLD_SCHEMAS)
def test_values_go_to_the_place_that_an_old_schema_has_for_them(server: Server, revision: str) -> None:
    """The newest MLflow creates the old schema, so the test needs no old release. Older releases read the values from
    trace_tags and trace_request_metadata."""
    server.pin(NEWEST)
    trace = server.run(NEWEST, TRACED)
    server.sql("UPDATE trace_info SET session_id = 'the session'")
    cluster = server.cluster
    with release(cluster, image(NEWEST)) as mlflow:
        for name in ("older", "again"):
            create_empty(cluster, name)
            mlflow.create(name, revision)
        outcome = carry(cluster, cluster.database, "older")
        mlflow.upgrade("older", image(NEWEST).head)
        carry(cluster, cluster.database, "again")
    found = dict(server.sql(f"SELECT key, value FROM trace_tags WHERE request_id = '{trace}'", "again"))
    assert found["mlflow.traceName"] == "the name"
    found = dict(server.sql(f"SELECT key, value FROM trace_request_metadata WHERE request_id = '{trace}'", "again"))
    assert found["mlflow.trace.session"] == "the session"
    assert json.loads(found["mlflow.trace.tokenUsage"]) == {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
    assert json.loads(found["mlflow.trace.cost"]) == {"input_cost": 0.25, "output_cost": 0.5, "total_cost": 0.75}
    columns = {f"{entry.table}.{entry.column}" for entry in outcome.left}
    assert not columns & {"trace_info.trace_name", "trace_info.session_id", "trace_info.total_tokens", "jobs.job_name"}
    if revision == "b7c8d9e0f1a2":
        assert server.sql("SELECT function_fullname FROM jobs", "again") == [("a job",)]
        assert columns >= {"spans.model_name", "spans.total_cost"}, "which have no place there"
    query = "SELECT trace_name, session_id, total_tokens, total_cost FROM trace_info"
    assert server.sql(query, "older") == server.sql(query) == [("the name", "the session", 18, 0.75)]


BEFORE_ANALYTICS = """
experiment = tracking.create_experiment("traced")
client = mlflow.MlflowClient(uri)
def trace(name):
    span = client.start_trace(name, experiment_id=experiment)
    client.end_trace(span.trace_id)
    return span.trace_id
result = [experiment, trace("stays"), trace("goes")]
"""


@pytest.mark.parametrize(
    "through",
    [(MIDDLE,), (OLDER,), (LAST, MIDDLE)],
)
def test_what_the_migrations_of_an_upgrade_changed_is_back_with_the_release_before(
    server: Server, through: tuple[str, ...]
) -> None:
    """Migration 75868b020152 shortens session IDs to 250 characters, and drops unknown keys of token usage and cost."""
    server.pin(MIDDLE)
    experiment, stays, goes = server.run(MIDDLE, BEFORE_ANALYTICS)
    usage = '{"input_tokens": 3, "reasoning_tokens": 4}'
    for trace in (stays, goes):
        server.sql(
            "INSERT INTO trace_request_metadata (request_id, key, value) VALUES "
            f"('{trace}', 'mlflow.trace.session', '{'s' * 300}'), ('{trace}', 'mlflow.trace.tokenUsage', '{usage}'); "
            f"INSERT INTO trace_metrics (request_id, key, value) VALUES ('{trace}', 'total_tokens', 2.5)"
        )
    rows_of = "SELECT key, value FROM trace_request_metadata WHERE request_id = '{}' ORDER BY key"
    before = server.sql(rows_of.format(stays))
    report = server.pin(NEWEST)
    lost = {(each["table"], each["column"]): (each["count"], each["remedy"]) for each in report["left"]}
    assert lost[("trace_request_metadata", "value")] == (4, "changed")
    assert lost[("trace_metrics", None)] == (2, "dropped")
    assert server.sql("SELECT DISTINCT length(session_id) FROM trace_info") == [(250,)]
    server.run(NEWEST, f"tracking.delete_traces('{experiment}', trace_ids=['{goes}'])")
    for version in through:
        report = server.pin(version)
    assert server.sql(rows_of.format(stays)) == before
    assert server.sql("SELECT request_id, value FROM trace_metrics WHERE key = 'total_tokens'") == [(stays, 2.5)]
    assert server.sql(rows_of.format(goes)) == []
    assert sum(len(tables) for tables in report["returned"].values()) == 2
    server.pin(NEWEST)
    server.pin(MIDDLE)
    assert server.sql(rows_of.format(stays)) == before


WORKSPACES = """
from mlflow.entities.workspace import Workspace
from mlflow.store.workspace.sqlalchemy_store import SqlAlchemyStore as Workspaces
Workspaces(uri).create_workspace(Workspace(name="team"))
"""


@pytest.mark.parametrize("older", [OLDER, lock.oldest_release()])
def test_workspaces_are_not_mixed_by_a_release_without_them_and_are_back(server: Server, older: str) -> None:
    """The default workspace and a second workspace contain experiments and models with equal names."""
    server.pin(NEWEST)
    server.run(NEWEST, WORKSPACES)
    for workspace in ("default", "team"):
        server.sql(
            f"""
            INSERT INTO experiments (name, lifecycle_stage, workspace) VALUES ('twin', 'active', '{workspace}');
            INSERT INTO runs (run_uuid, name, status, lifecycle_stage, experiment_id)
                SELECT '{workspace}', '{workspace}', 'FINISHED', 'active', max(experiment_id) FROM experiments;
            INSERT INTO registered_models (name, creation_time, workspace) VALUES ('twin', 1, '{workspace}');
            INSERT INTO model_versions (name, version, creation_time, description, workspace, run_id)
                VALUES ('twin', {1 if workspace == "default" else 2}, 1, '{workspace}', '{workspace}', '{workspace}');
            """
        )
    tables = ("workspaces", "experiments", "runs", "registered_models", "model_versions")
    before = {table: server.sql(f"SELECT t::text FROM {table} AS t ORDER BY 1") for table in tables}
    report = server.pin(older)
    if older != OLDER:
        assert server.run(older, "result = [each.name for each in registry.search_registered_models()]") == ["twin"]
        assert left(report)["registered_models.workspace"][0] == 1
        assert server.sql("SELECT name, version, description FROM model_versions") == [("twin", 1, "default")]
    report = server.pin(NEWEST)
    assert {table: server.sql(f"SELECT t::text FROM {table} AS t ORDER BY 1") for table in tables} == before
    assert not [each for found in report["returned"].values() for each in found if each["refused"]]
