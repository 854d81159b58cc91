"""Worker process: write and read every kind of data that MLflow stores, with the interpreter's own MLflow release.

The worker reads one JSON request per line from stdin, and writes one JSON reply per line to stdout. The import of
MLflow takes seconds, so a whole drill uses one worker. The requests are:

    ["write", URI, FOLDER, STOP]   Write one object of each kind for this stop. As of the second stop, also change and
                                   delete objects of earlier stops.
                                   Reply: {"changed": [[section, id], …], "deleted": [[section, id], …]}.
    ["read", URI]                  Read all objects. Reply: {section: {id: MLflow's data about the object}}.

URI is the URI of a server or a database. If URI names a database, the worker opens MLflow's stores without a server,
and writes artifacts to FOLDER. The worker skips the kinds of data that the release or the server does not support. This
file imports no other module of this project, because the interpreter may belong to another virtual environment.
"""

from __future__ import annotations

import enum
import gc
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_ENABLE_ASYNC_TRACE_LOGGING="false",
    MLFLOW_ENABLE_ASYNC_LOGGING="false",
    MLFLOW_CRYPTO_KEK_PASSPHRASE="a passphrase for tests only",
    MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY="cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true",
)

import mlflow
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException

Touched = dict[str, list[list[str]]]


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        verb, uri, *rest = json.loads(line)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = MlflowClient(uri, uri)
        try:
            reply: dict[str, Any] = {"result": write(client, *rest) if verb == "write" else read(client)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        finally:
            disconnect()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def disconnect() -> None:
    """Close the connection pools of all stores that this process opened. The boot step `database` closes open sessions,
    and MLflow's next query on a closed session would fail."""
    for store in [each for each in gc.get_objects() if type(each).__name__.startswith("SqlAlchemy")]:
        engine = getattr(store, "engine", None)
        if engine is not None:
            engine.dispose()


def write(client: Any, folder: str, stop: str) -> Touched:
    touched: Touched = {"changed": [], "deleted": []}
    change_earlier_objects(client, stop, touched)
    experiment = write_experiments(client, folder, stop)
    run = write_runs(client, experiment, stop)
    write_models(client, experiment, run, stop)
    trace = write_traces(client, experiment, run, stop)
    for optional in (
        write_prompts,
        write_webhooks,
        write_datasets,
        write_scorers,
        write_gateway,
        write_scorer_uses,
        write_issues,
        write_labels,
        write_mcp,
        write_skills,
        write_jobs,
        write_workspaces,
    ):
        with suppress_unknown():
            optional(client, experiment, run, trace, stop)
    return touched


@contextmanager
def suppress_unknown() -> Iterator[None]:
    """Ignore the errors that an older server returns for unknown endpoints."""
    try:
        yield
    except MlflowException as error:
        if not is_unknown_endpoint(error):
            raise


def is_unknown_endpoint(error: MlflowException) -> bool:
    return error.error_code == "ENDPOINT_NOT_FOUND" or "error code 404" in str(error)


def uses_server(client: Any) -> bool:
    """Whether the client is connected to a server and not to a database."""
    return str(client.tracking_uri).startswith("http")


def write_experiments(client: Any, folder: str, stop: str) -> str:
    place = f"file://{folder}/{stop}" if folder else None
    experiment = client.create_experiment(f"experiment {stop}", place, {"stop": stop})
    client.set_experiment_tag(experiment, "mlflow.note.content", f"notes of {stop} with ünïcode, 'quotes' and\ttabs\\n")
    try:
        client.set_experiment_tag(experiment, "long", (f"wide {stop} " * 2000)[:19000])
    except MlflowException as error:  # up to MLflow 3.16, a tag's value has at most 5,000 characters
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        client.set_experiment_tag(experiment, "long", "x" * 4900)
    deleted = client.create_experiment(f"deleted {stop}", place)
    client.log_metric(client.create_run(deleted).info.run_id, "m", 1.0)
    client.delete_experiment(deleted)
    return str(experiment)


def write_runs(client: Any, experiment: str, stop: str) -> str:
    parent = client.create_run(experiment, run_name=f"parent {stop}", tags={"kind": "parent"}).info.run_id
    history = [Metric("loss", 1 / (step + 1), 1_700_000_000_000 + step, step) for step in range(300)]
    odd = [
        Metric("odd", number, 1_700_000_000_000, i) for i, number in enumerate((math.nan, math.inf, -math.inf, 1e-300))
    ]
    twice = [Metric("twice", number, 1_700_000_000_000 + n, 1) for n, number in enumerate((0.25, 0.5))]
    longest = [Metric("m" * 250, 1.0, 1_700_000_000_000, 0)]
    params = [Param("lr", "1e-3"), Param("empty", ""), Param("p" * 250, "v" * 500)]
    client.log_batch(parent, history + odd + twice + longest, params, [RunTag("note", "a\nb\\c")])
    source = json.dumps({"tags": {"mlflow.user": "someone"}})
    dataset = Dataset(f"data {stop}", f"digest-{stop}", "code", source, '{"schema": 1}', '{"rows": 3}')
    client.log_text(parent, f"written at {stop}", "notes/text.txt")
    client.log_inputs(parent, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
    for number in range(3):
        tags = {"mlflow.parentRunId": parent}
        child = client.create_run(experiment, run_name=f"child {number}", tags=tags).info.run_id
        for step in range(3):
            client.log_metric(child, "accuracy", 0.5 + step / 10, step=step)
        client.set_terminated(child, "FAILED" if number == 1 else "FINISHED")
        if number == 2:
            client.delete_run(child)
    client.set_terminated(parent)
    return str(parent)


def write_models(client: Any, experiment: str, run: str, stop: str) -> None:
    model = client.create_logged_model(
        experiment,
        name=f"model-{stop}",
        source_run_id=run,
        tags={"t": stop},
        params={"depth": "3", "stop": stop},
        model_type="sklearn",
    )
    client.finalize_logged_model(model.model_id, "READY")
    client.log_metric(run, "model_metric", 0.75, step=1, model_id=model.model_id)
    name = f"registered-{stop}"
    client.create_registered_model(name, {"team": stop}, f"described {stop}")
    for _ in range(3):
        client.create_model_version(name, f"runs:/{run}/m", run, tags={"v": stop}, description="of a version")
    client.set_registered_model_alias(name, "champion", "2")
    client.set_registered_model_alias(name, "latest-good", "1")
    client.set_model_version_tag(name, "1", "checked", "yes")
    client.delete_model_version(name, "3")


def write_traces(client: Any, experiment: str, run: str, stop: str) -> str:
    traces = []
    linked: tuple[str, str] | None = None
    for number in range(3):
        span = client.start_trace(
            f"trace {stop} {number}",
            span_type="CHAIN",
            inputs={"question": "why?", "stop": stop},
            attributes={"number": number},
            tags={"stop": stop},
            experiment_id=experiment,
        )
        inner = client.start_span(
            "llm", span.trace_id, span.span_id, span_type="CHAT_MODEL", inputs={"messages": []}, **links_to(linked)
        )
        inner.set_attribute("mlflow.llm.model", "model-a")
        inner.set_attribute("mlflow.llm.provider", "provider-b")
        inner.set_attribute(
            "mlflow.chat.tokenUsage", {"input_tokens": 11, "output_tokens": 7 + number, "total_tokens": 18 + number}
        )
        inner.set_attribute("mlflow.llm.cost", {"input_cost": 0.001, "output_cost": 0.002, "total_cost": 0.003})
        if number == 1:
            inner.set_attribute("large", "x" * 200_000)
        client.end_span(span.trace_id, inner.span_id, outputs={"answer": 42}, status="OK")
        client.end_trace(span.trace_id, outputs={"answer": f"because {stop}"}, status="ERROR" if number == 2 else "OK")
        traces.append(span.trace_id)
        linked = span.trace_id, inner.span_id
    source = mlflow.entities.AssessmentSource(source_type="HUMAN", source_id="someone")
    feedback = {"trace_id": traces[0], "name": "quality", "source": source, "metadata": {"stop": stop}}
    mlflow.log_feedback(value=4.5, rationale="good", **feedback)
    mlflow.log_feedback(**{**feedback, "name": "safe"}, value=True)
    mlflow.log_expectation(trace_id=traces[1], name="expected", value={"a": [1, 2]}, source=source)
    client._tracking_client.store.link_traces_to_run(traces[:2], run)
    return str(traces[0])


def links_to(span: tuple[str, str] | None) -> dict[str, Any]:
    """The arguments of `start_span` that link the new span to `span`, a span of another trace. The dict is empty if
    `span` is None, or if the MLflow release has no links."""
    link = getattr(mlflow.entities, "Link", None)
    if span is None or link is None:
        return {}
    return {"links": [link(trace_id=span[0], span_id=span[1], attributes={"reason": "retry", "attempt": 2})]}


def write_prompts(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    name = f"prompt-{stop}"
    client.register_prompt(name, "Answer {{question}} at " + stop, commit_message="first", tags={"lang": "en"})
    client.register_prompt(name, [{"role": "user", "content": "{{question}}"}], commit_message="chat form")
    client.set_prompt_alias(name, "production", 1)


def write_webhooks(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    # MLflow requires a public address. No server listens on 192.88.99.1 (RFC 7526).
    client.create_webhook(
        f"webhook-{stop}",
        "https://192.88.99.1/never-called",
        ["registered_model.created", "model_version_alias.created"],
        description=stop,
        secret="whsec",
        status="DISABLED",
    )


def write_datasets(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    store = client._tracking_client.store
    dataset = store.create_dataset(f"dataset {stop}", {"owner": "someone"}, [experiment])
    records = [{"inputs": {"q": n}, "expectations": {"a": n * 2}, "tags": {"n": str(n)}} for n in range(4)]
    store.upsert_dataset_records(dataset.dataset_id, records)


def write_scorers(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    store = client._tracking_client.store
    for version in (1, 2):
        store.register_scorer(experiment, f"scorer-{stop}", json.dumps({"name": "s", "version": version}))


def write_gateway(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    store = client._tracking_client.store
    from mlflow.entities.gateway_endpoint import GatewayEndpointModelConfig, GatewayModelLinkageType

    secret = store.create_gateway_secret(
        f"secret {stop}", {"api_key": f"sk-{stop}-0123456789"}, "openai", None, "someone"
    )
    model = store.create_gateway_model_definition(f"definition {stop}", secret.secret_id, "openai", "gpt-x", "someone")
    config = GatewayEndpointModelConfig(model.model_definition_id, GatewayModelLinkageType.PRIMARY, 1.0)
    endpoint = store.create_gateway_endpoint(f"endpoint-{stop}", [config], "someone", experiment_id=experiment)
    store.set_gateway_endpoint_tag(endpoint.endpoint_id, mlflow.entities.GatewayEndpointTag("stop", stop))
    write_budget(store, endpoint, stop)


def write_budget(store: Any, endpoint: Any, stop: str) -> None:
    from mlflow.entities import gateway_budget_policy as budgets

    store.create_budget_policy(
        budgets.BudgetUnit.USD,
        12.5,
        budgets.BudgetDuration(budgets.BudgetDurationUnit.DAYS, 7),
        budgets.BudgetTargetScope.GLOBAL,
        budgets.BudgetAction.ALERT,
        created_by=stop,
    )


def write_scorer_uses(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    store = client._tracking_client.store
    if uses_server(client) or not has(store, "create_endpoint_binding"):
        return
    endpoint = next(each for each in store.list_gateway_endpoints() if each.name == f"endpoint-{stop}")
    scorer = store.register_scorer(experiment, f"judge-{stop}", json.dumps({"name": "judge"}))
    store.create_endpoint_binding(endpoint.endpoint_id, "scorer", scorer.scorer_id, "someone")
    if has(store, "upsert_online_scoring_config"):
        store.upsert_online_scoring_config(experiment, f"judge-{stop}", 0.0, "trace.status = 'OK'")
    if has(store, "create_gateway_guardrail"):
        guardrails: Any = import_module("mlflow.entities.gateway_guardrail")
        guardrail = store.create_gateway_guardrail(
            f"guardrail {stop}",
            scorer.scorer_id,
            scorer.scorer_version,
            guardrails.GuardrailStage.BEFORE,
            guardrails.GuardrailAction.VALIDATION,
            created_by="someone",
        )
        store.add_guardrail_to_endpoint(endpoint.endpoint_id, guardrail.guardrail_id, 1, "someone")


def write_issues(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    store = client._tracking_client.store
    if has(store, "create_issue"):
        store.create_issue(experiment, f"issue {stop}", "it fails", categories=["Latency", "Cost"], source_run_id=run)


def write_labels(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    store = client._tracking_client.store
    if not has(store, "create_label_schema"):
        return
    from mlflow.genai import label_schemas

    schema = store.create_label_schema(
        experiment,
        name=f"label-{stop}",
        type=label_schemas.LabelSchemaType.FEEDBACK,
        input=label_schemas.InputPassFail("yes", "no"),
        instruction="look",
    )
    if has(store, "create_review_queue"):
        from mlflow.genai import review_queues

        queue = store.create_review_queue(
            experiment,
            name=f"queue-{stop}",
            queue_type=review_queues.ReviewQueueType.CUSTOM,
            users=["ann", "bob"],
            schema_ids=[schema.schema_id],
        )
        store.add_items_to_review_queue(queue.queue_id, item_ids=[trace])


def write_mcp(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    store = client._tracking_client.store
    if not has(store, "create_mcp_server"):
        return
    name = f"com.example/server-{stop}"
    store.create_mcp_server(name, "serves", created_by="someone")
    definition = {"name": name, "version": "1.0.0", "description": "serves", "remotes": []}
    store.create_mcp_server_version(definition, source="https://example.com", created_by="someone")
    store.set_mcp_server_tag(name, "stop", stop)
    store.set_mcp_server_version_tag(name, "1.0.0", "stop", stop)
    store.set_mcp_server_alias(name, "stable", "1.0.0")
    if not uses_server(client):
        store.create_mcp_access_endpoint(name, "https://example.com/mcp", server_version="1.0.0", created_by="someone")


def write_skills(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    store = client._tracking_client.store
    if not has(store, "create_skill"):
        return
    store.create_skill(f"skill-{stop}", description="does", created_by="someone")
    store.create_skill_version(f"skill-{stop}", source_type="git", source="https://example.com/x.git", ref="main")
    store.set_skill_tag(f"skill-{stop}", "stop", stop)
    store.set_skill_alias(f"skill-{stop}", "stable", 1)
    if not uses_server(client):
        store.set_skill_version_tag(f"skill-{stop}", 1, "stop", stop)


def write_jobs(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    if uses_server(client):
        return
    store = job_store(client)
    job = store.create_job(f"job-{stop}", json.dumps({"stop": stop}))
    store.start_job(job.job_id)
    store.finish_job(job.job_id, json.dumps("done"))


def write_workspaces(client: Any, experiment: str, run: str, trace: str, stop: str) -> None:
    if not uses_server(client) and (store := workspace_store(client)):
        workspace: Any = import_module("mlflow.entities.workspace").Workspace
        store.create_workspace(workspace(name=f"team-{stop}", description=f"made at {stop}"))


def workspace_store(client: Any) -> Any:
    """MLflow's store of workspaces, or None if the release has no workspaces."""
    try:
        return import_module("mlflow.store.workspace.sqlalchemy_store").SqlAlchemyStore(client.tracking_uri)
    except ImportError:
        return None


def job_store(client: Any) -> Any:
    return import_module("mlflow.store.jobs.sqlalchemy_store").SqlAlchemyJobStore(client.tracking_uri)


def change_earlier_objects(client: Any, stop: str, touched: Touched) -> None:
    """Change objects of the previous stop: set and delete tags of a run, log a metric, delete a run and a trace, move
    an alias, and change a model version's description. If the number of earlier stops is even, also shorten the tag
    `long` of an experiment. If the worker uses a server, the run is only marked as deleted."""
    earlier = sorted(
        (e for e in client.search_experiments(ViewType.ACTIVE_ONLY) if "stop" in e.tags), key=lambda e: e.creation_time
    )
    if not earlier:
        return
    experiment = earlier[-1]
    was = experiment.tags["stop"]
    if len(earlier) % 2 == 0:
        client.set_experiment_tag(experiment.experiment_id, "long", f"shortened at {stop}")
        touched["changed"].append(["experiments", experiment.experiment_id])
    runs = client.search_runs([experiment.experiment_id], "", ViewType.ACTIVE_ONLY, 50)
    parent = next(run for run in runs if run.data.tags.get("kind") == "parent")
    client.set_tag(parent.info.run_id, "seen", stop)
    client.delete_tag(parent.info.run_id, "note")
    client.log_metric(parent.info.run_id, "loss", 0.0, step=1000)
    touched["changed"].append(["runs", parent.info.run_id])
    child = next(run for run in runs if run.info.run_name == "child 0")
    store = client._tracking_client.store
    client.delete_run(child.info.run_id)
    if has(store, "_hard_delete_run"):
        store._hard_delete_run(child.info.run_id)
        touched["deleted"].append(["runs", child.info.run_id])
    else:
        touched["changed"].append(["runs", child.info.run_id])
    traces = client.search_traces(experiment_ids=[experiment.experiment_id], max_results=50, include_spans=False)
    last = max(traces, key=lambda trace: trace.info.tags["mlflow.traceName"])
    client.delete_traces(experiment.experiment_id, trace_ids=[last.info.trace_id])
    touched["deleted"].append(["traces", last.info.trace_id])
    client.set_registered_model_alias(f"registered-{was}", "champion", "1")
    client.update_model_version(f"registered-{was}", "2", f"changed at {stop}")
    touched["changed"] += [["registered_models", f"registered-{was}"]]
    touched["changed"] += [["model_versions", f"registered-{was}/{version}"] for version in (1, 2)]


def read(client: Any) -> dict[str, dict[str, Any]]:
    store, registry = client._tracking_client.store, client._get_registry_client().store
    experiments = {e.experiment_id: e for e in client.search_experiments(ViewType.ALL, max_results=1000)}
    ids = list(experiments)
    active = [name for name, experiment in experiments.items() if experiment.lifecycle_stage == "active"]
    prompts = "tags.`mlflow.prompt.is_prompt` = 'true'"

    def of_active(search: Any) -> list[Any]:
        return [found for experiment in active for found in _pages(search, experiment)]

    def scorers() -> dict[str, Any]:
        return {
            f"{experiment}/{s.scorer_name}/{version.scorer_version}": plain(version)
            for experiment in active
            for s in store.list_scorers(experiment)
            for version in store.list_scorer_versions(experiment, s.scorer_name)
        }

    def registered_models() -> dict[str, Any]:
        found = [*_pages(registry.search_registered_models), *_pages(registry.search_registered_models, prompts)]
        return {model.name: plain(model) for model in found}

    def model_versions() -> dict[str, Any]:
        found = [*_pages(registry.search_model_versions), *_pages(registry.search_model_versions, prompts)]
        return {f"{version.name}/{version.version}": plain(version) for version in found}

    def traces() -> dict[str, Any]:
        found = client.search_traces(experiment_ids=ids, max_results=500, include_spans=True)
        return {trace.info.trace_id: _trace(store, trace.info.trace_id) for trace in found}

    def review_queues() -> dict[str, Any]:
        return {
            queue.queue_id: {
                "queue": plain(queue),
                "items": plain(_pages(store.list_review_queue_items, queue.queue_id)),
            }
            for queue in of_active(store.list_review_queues)
        }

    def versions_of(servers: Any, search: str) -> dict[str, Any]:
        return {
            f"{thing.name}/{version.version}": plain(version)
            for thing in _pages(servers)
            for version in _pages(getattr(store, search), thing.name)
        }

    def jobs() -> dict[str, Any]:
        return {job.job_id: plain(job) for job in job_store(client).list_jobs()}

    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "experiments": lambda: plain(experiments),
        "runs": lambda: {r.info.run_id: _run(client, r) for r in _pages(client.search_runs, ids, "", ViewType.ALL)},
        "logged_models": lambda: {m.model_id: plain(m) for m in _pages(client.search_logged_models, ids)},
        "registered_models": registered_models,
        "model_versions": model_versions,
        "traces": traces,
        "webhooks": lambda: {hook.webhook_id: plain(hook) for hook in _pages(client.list_webhooks)},
        "datasets": lambda: {d.dataset_id: _dataset(store, d) for d in _pages(store.search_datasets)},
        "scorers": scorers,
        "secrets": lambda: {secret.secret_id: plain(secret) for secret in store.list_secret_infos()},
        "definitions": lambda: {d.model_definition_id: plain(d) for d in store.list_gateway_model_definitions()},
        "endpoints": lambda: {endpoint.endpoint_id: plain(endpoint) for endpoint in store.list_gateway_endpoints()},
        "budgets": lambda: {b.budget_policy_id: plain(b) for b in _pages(store.list_budget_policies)},
    }
    if has(store, "search_issues"):
        sections["issues"] = lambda: {i.issue_id: plain(i) for i in of_active(store.search_issues)}
    if has(store, "list_label_schemas"):
        sections["label_schemas"] = lambda: {s.schema_id: plain(s) for s in of_active(store.list_label_schemas)}
    if has(store, "list_review_queues"):
        sections["review_queues"] = review_queues
    if has(store, "search_mcp_servers"):
        sections["mcp_servers"] = lambda: {server.name: plain(server) for server in _pages(store.search_mcp_servers)}
        sections["mcp_versions"] = lambda: versions_of(store.search_mcp_servers, "search_mcp_server_versions")
    if has(store, "search_skills"):
        sections["skills"] = lambda: {skill.name: plain(skill) for skill in _pages(store.search_skills)}
        sections["skill_versions"] = lambda: versions_of(store.search_skills, "search_skill_versions")
    if not uses_server(client):
        sections["jobs"] = jobs
        sections |= of_databases(client, store, active)
    found: dict[str, dict[str, Any]] = {}
    for section, answer in sections.items():
        with suppress_unknown():
            found[section] = answer()
    return found


def of_databases(client: Any, store: Any, active: list[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Functions that read the kinds of objects that a worker writes only if it uses a database without a server."""
    sections: dict[str, Callable[[], dict[str, Any]]] = {}
    if has(store, "list_endpoint_bindings"):
        sections["bindings"] = lambda: {
            f"{b.endpoint_id}/{b.resource_id}": plain(b) for b in store.list_endpoint_bindings()
        }
    if has(store, "list_gateway_guardrails"):
        sections["guardrails"] = lambda: {g.guardrail_id: plain(g) for g in _pages(store.list_gateway_guardrails)}
    if has(store, "list_endpoint_guardrail_configs"):
        sections["guardrail_configs"] = lambda: {
            f"{endpoint.endpoint_id}/{config.guardrail_id}": plain(config)
            for endpoint in store.list_gateway_endpoints()
            for config in store.list_endpoint_guardrail_configs(endpoint.endpoint_id)
        }
    if has(store, "get_online_scoring_configs"):
        sections["online_scoring_configs"] = lambda: {
            config.online_scoring_config_id: plain(config)
            for experiment in active
            for scorer in store.list_scorers(experiment)
            for config in store.get_online_scoring_configs([scorer.scorer_id])
        }
    if has(store, "search_mcp_access_endpoints"):
        sections["mcp_access_endpoints"] = lambda: {e.id: plain(e) for e in _pages(store.search_mcp_access_endpoints)}
    if workspaces := workspace_store(client):
        sections["workspaces"] = lambda: {each.name: plain(each.to_dict()) for each in workspaces.list_workspaces()}
    return sections


def _run(client: Any, run: Any) -> dict[str, Any]:
    run = client.get_run(run.info.run_id)
    entry = plain(run)
    if run.data.tags.get("kind") == "parent":
        entry["artifacts"] = sorted(file.path for file in client.list_artifacts(run.info.run_id, "notes"))
        entry["text"] = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/notes/text.txt")
    entry["history"] = {
        key: sorted(
            ([m.step, m.timestamp, plain(m.value)] for m in client.get_metric_history(run.info.run_id, key)), key=str
        )
        for key in run.data.metrics
    }
    return dict(entry)


def _trace(store: Any, trace_id: str) -> dict[str, Any]:
    found = store.batch_get_traces([trace_id])
    info = store.get_trace_info(trace_id)
    spans = [span.to_dict() for trace in found for span in trace.data.spans]
    return {"info": plain(info), "spans": sorted(spans, key=lambda span: str(span["span_id"]))}


def _dataset(store: Any, dataset: Any) -> dict[str, Any]:
    full = store.get_dataset(dataset.dataset_id)
    records, _ = store._load_dataset_records(dataset.dataset_id, max_results=1000)
    return {
        "dataset": {k: v for k, v in plain(full.to_dict()).items() if k != "records"},
        "records": sorted((plain(record.to_dict()) for record in records), key=lambda r: str(r["dataset_record_id"])),
    }


def has(store: Any, method: str) -> bool:
    return method in dir(type(store))


def _pages(search: Any, *arguments: Any) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        try:
            page = search(*arguments, page_token=token)
        except TypeError:
            return list(search(*arguments))
        items = page if isinstance(page, list) else getattr(page, "items", None) or list(page)
        found += items
        token = getattr(page, "token", None) or getattr(page, "next_page_token", None)
        if not token:
            return found


def plain(thing: Any) -> Any:
    """Convert a value for JSON. Attribute names lose leading underscores. NaN and infinite values become text."""
    if isinstance(thing, float):
        return thing if math.isfinite(thing) else str(thing)
    if thing is None or isinstance(thing, bool | int | str):
        return thing
    if isinstance(thing, enum.Enum):
        return thing.name
    if isinstance(thing, bytes):
        return thing.hex()
    if isinstance(thing, dict):
        return {str(key): plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set):
        return sorted((plain(entry) for entry in thing), key=lambda e: json.dumps(e, sort_keys=True))
    if hasattr(thing, "__dict__"):
        return {key.lstrip("_"): plain(value) for key, value in vars(thing).items() if not callable(value)}
    return str(thing)


if __name__ == "__main__":
    main()
