"""Worker process of `release.Release`: runs tasks with the MLflow of the interpreter that runs this file.

Reads one JSON request per line on stdin and writes one JSON reply per line on stdout, until stdin ends. Importing
MLflow takes seconds, so the step starts one worker early and sends it all tasks. This file imports nothing from
mlflow_host, because tests run it with the interpreters of other environments.
"""

from __future__ import annotations

import ast
import enum
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

MODELS = (
    "mlflow.store.tracking.dbmodels.models",
    "mlflow.store.model_registry.dbmodels.models",
    "mlflow.store.workspace.dbmodels.models",
)
"""The modules with the classes of MLflow's tables; older releases lack some of them."""

READ_AT_MOST = 200
"""Rows of each table that are read as MLflow's objects."""

PAGE_ROWS = 2000
"""Rows that a migration in `KNOWN_FUNCTIONS` reads and updates at once, in place of MLflow's 250."""

NAMED_AT_MOST = 3
"""Unreadable rows of each table that are named."""


def head() -> str:
    utils: Any = import_module("mlflow.store.db.utils")
    return str(utils._get_latest_schema_revision())


def create(uri: str, revision: str) -> None:
    """Create the tables in an empty database as MLflow's store does: the initial tables, then all migrations."""
    first_tables: Any = import_module("mlflow.store.tracking.dbmodels.initial_models")
    engine = _engine(uri)
    first_tables.Base.metadata.create_all(engine)
    engine.dispose()
    upgrade(uri, revision)


def upgrade(uri: str, revision: str) -> None:
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    utils: Any = import_module("mlflow.store.db.utils")
    engine = _engine(uri)
    import_module("sqlalchemy").event.listen(engine, "before_execute", _compare_keys_as_rows, retval=True)
    config = utils._get_alembic_config(uri)
    script = ScriptDirectory.from_config(config)
    _quicken(script)

    def steps(current: Any, _: Any) -> Any:
        return script._upgrade_revs(revision, current)

    # alembic's command.upgrade, with the prepared scripts.
    with engine.begin() as connection, EnvironmentContext(config, script, fn=steps, destination_rev=revision):
        config.attributes["connection"] = connection
        script.run_env()
    engine.dispose()


def _compare_keys_as_rows(connection: Any, statement: Any, *rest: Any) -> Any:
    """SQLAlchemy's hook before each statement: `(a, b) > (x, y)` for `a > x OR a = x AND b > y`, which is the same.

    MLflow's migrations read large tables page by page in this way. PostgreSQL finds the first row of a page in an index
    by the short form only; by the long one, each page reads all pages before it.
    """
    sqlalchemy: Any = import_module("sqlalchemy")
    operators, elements = import_module("operator"), sqlalchemy.sql.elements

    def is_(expression: Any, operator: str) -> bool:
        return getattr(expression, "operator", None) is getattr(operators, operator)

    def replaced(element: Any, **_: Any) -> Any:
        if not (isinstance(element, elements.BooleanClauseList) and is_(element, "or_") and len(element.clauses) == 2):
            return None
        above, tie = (each.element if isinstance(each, elements.Grouping) else each for each in element.clauses)
        if not (isinstance(tie, elements.BooleanClauseList) and is_(tie, "and_") and len(tie.clauses) == 2):
            return None
        same, after = tie.clauses
        if not (is_(above, "gt") and is_(same, "eq") and is_(after, "gt") and above.left is same.left):
            return None
        if not all(isinstance(each.right, elements.BindParameter) for each in (above, same)):
            return None
        if above.right.effective_value != same.right.effective_value:
            return None
        return sqlalchemy.tuple_(above.left, after.left) > sqlalchemy.tuple_(above.right, after.right)

    if isinstance(statement, sqlalchemy.sql.Select) and statement.whereclause is not None:
        visitors = sqlalchemy.sql.visitors
        if any(replaced(each) is not None for each in visitors.iterate(statement.whereclause)):
            statement = visitors.replacement_traverse(statement, {}, replaced)
    return statement, *rest[:2]


def _quicken(script: Any) -> None:
    """Replace the functions of `KNOWN_FUNCTIONS`. A function that MLflow changed stays, and so does the length of the
    pages that it reads."""
    for revision, functions in KNOWN_FUNCTIONS.items():
        try:
            migration = script.get_revision(revision).module
        except Exception:  # this release does not have it
            continue
        known = [name for name in functions if _digest(getattr(migration, name, None)) == functions[name][0]]
        for name in known:
            setattr(migration, name, partial(functions[name][1], migration, getattr(migration, name)))
        if known == list(functions):
            migration._BATCH_SIZE = PAGE_ROWS


def _digest(function: Any) -> str:
    """SHA-256 of a function's syntax tree; "" for anything else."""
    try:
        tree = ast.unparse(ast.parse(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(tree.encode()).hexdigest()


def _delete_keys(migration: Any, _: Any, table: Any, keys: list[str] | None = None) -> None:
    """Delete the rows of a table with these keys; without keys, those of the costs, which are columns now."""
    migration.op.get_bind().execute(table.delete().where(table.c.key.in_(keys or list(migration._COST_COLUMNS))))


def _skip_empty_spans(migration: Any, backfill: Callable[[], None]) -> None:
    """Call MLflow's function, which reads only spans that have a model, a cost, or a value in one of the new columns.
    It does not change the others."""
    sqlalchemy: Any = import_module("sqlalchemy")

    def skip(_: Any, statement: Any, *rest: Any) -> Any:
        columns = getattr(statement, "selected_columns", {})
        if "dimension_attributes" in columns:
            spans = columns["dimension_attributes"].table
            metrics = sqlalchemy.table("span_metrics", *map(sqlalchemy.column, ("trace_id", "span_id", "key")))
            # For EXISTS, PostgreSQL would read all of span_metrics for each page. It answers this from the index.
            cost = sqlalchemy.select(metrics.c.key).where(
                metrics.c.trace_id == spans.c.trace_id,
                metrics.c.span_id == spans.c.span_id,
                metrics.c.key.in_(list(migration._COST_COLUMNS)),
            )
            keys = ("trace_id", "span_id")
            filled = [column.is_not(None) for column in columns if column.name not in keys]
            statement = statement.where(sqlalchemy.or_(*filled, cost.limit(1).scalar_subquery().is_not(None)))
        return statement, *rest[:2]

    bind = migration.op.get_bind()
    sqlalchemy.event.listen(bind, "before_execute", skip, retval=True)
    try:
        backfill()
    finally:
        sqlalchemy.event.remove(bind, "before_execute", skip)


def _join_keys(migration: Any, _: Any, span_metrics: Any, keys: list[Any], dialect: str) -> Any:
    """The query for the costs of the spans with these keys. MLflow's has a list of pairs after IN, for which PostgreSQL
    plans one index scan per pair."""
    query = """
        SELECT trace_id, span_id, key, value FROM span_metrics
        JOIN unnest(CAST(:traces AS text[]), CAST(:spans AS text[])) AS page (trace_id, span_id)
        USING (trace_id, span_id) WHERE key = ANY (:costs)
    """
    traces, spans = zip(*keys, strict=True)
    given = {"traces": [*traces], "spans": [*spans], "costs": [*migration._COST_COLUMNS]}
    return import_module("sqlalchemy").text(query).bindparams(**given)


def _update_at_once(_: Any, __: Any, bind: Any, statement: Any, updates: list[dict[str, Any]], kind: str) -> None:
    """Update all rows with one UPDATE ... FROM (VALUES ...). MLflow executes `statement` once per row. The parameters
    of its condition have names of their own; the others have the names of their columns."""
    extras: Any = import_module("psycopg2.extras")
    quote, text = bind.dialect.identifier_preparer.quote, import_module("sqlalchemy").String
    where, table = statement.whereclause, quote(statement.table.name)
    keys = {each.right.key: each.left for each in getattr(where, "clauses", [where])}
    columns = [keys[name] if name in keys else statement.table.c[name] for name in updates[0]]
    # A cast to VARCHAR(n) would cut a longer value, so texts have none; NULL needs the others.
    casts = ["%s" if isinstance(c.type, text) else f"%s::{c.type.compile(bind.dialect)}" for c in columns]
    assigned = [f"{quote(name)} = given.{quote(name)}" for name in updates[0] if name not in keys]
    found = [f"{table}.{quote(c.name)} = given.{quote(c.name)}" for c in keys.values()]
    given = f"(VALUES %s) AS given ({', '.join(quote(c.name) for c in columns)})"
    sql = f"UPDATE {table} SET {', '.join(assigned)} FROM {given} WHERE {' AND '.join(found)}"
    rows = [[update[name] for name in updates[0]] for update in updates]
    with bind.connection.cursor() as cursor:
        extras.execute_values(cursor, sql, rows, f"({', '.join(casts)})", page_size=len(rows))
        if cursor.rowcount != len(rows):
            raise RuntimeError(f"Trace analytics {kind} backfill updated {cursor.rowcount} of {len(rows)} rows")


KNOWN_FUNCTIONS: dict[str, dict[str, tuple[str, Callable[..., None]]]] = {
    "75868b020152": {
        "_delete_trace_rows": ("2db101a6b84bf1a56574e8da8335b880f08e460bf835956b26d292f8572491a4", _delete_keys),
        "_delete_span_metric_rows": ("c811548869bdf5c49dacd07a3458238eacf286524e2abf795d4f9a9ecb62503a", _delete_keys),
        "_backfill_span_analytics": (
            "b0b74886fd8d3c5394027cc8c8310e8cb991cf65c3f558b941356fbd7abc0c07",
            _skip_empty_spans,
        ),
        "_span_metrics_for_keys_query": (
            "45c2ff0244d0c0145c31307058cce353ae7b588418cd5112e5f178adf0b1e228",
            _join_keys,
        ),
        "_execute_backfill_updates": (
            "aa4b2dfaa00d4d7bb0e54f0df0837225fcd814520cc96848e934e81856405e9f",
            _update_at_once,
        ),
    }
}
"""Functions of MLflow's migrations that are slow with many rows: revision → function → SHA-256 of its syntax tree, and
what replaces it. Two delete rows by their key in batches, each of which reads all rows that were deleted before; one
reads all spans to update those with a model or costs; one updates row by row."""


def enumerations() -> dict[str, list[str]]:
    """The values that MLflow can read, by "table.column", of the columns that its models convert to an enumeration, as
    in `BudgetTargetScope(self.target_scope)` and `JobStatus.from_int(self.status)`. Any other value raises an error."""
    found: dict[str, set[str]] = {}
    for module in _models():
        for node in ast.parse(inspect.getsource(module)).body:
            model: Any = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
            if not hasattr(model, "__mapper__"):
                continue
            for column, values in _conversions(module, model, node):
                name = f"{model.__tablename__}.{column}"
                found[name] = found.get(name, values) & values
    return {name: sorted(values) for name, values in sorted(found.items())}


def _conversions(module: Any, model: Any, source: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """(column, values) for each call in a model's source that converts one of its columns to an enumeration."""
    imported = {
        each.asname or each.name: (node.module, each.name)
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and node.module
        for each in node.names
    }
    for node in ast.walk(source):
        if not (isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords):
            continue
        argument, function = node.args[0], node.func
        method = function.attr if isinstance(function, ast.Attribute) else None
        owner = function.value if isinstance(function, ast.Attribute) else function
        if not isinstance(argument, ast.Attribute) or argument.attr not in model.__mapper__.columns:
            continue
        if not isinstance(owner, ast.Name):
            continue
        kind = getattr(module, owner.id, None)
        if owner.id in imported:
            with suppress(ImportError):
                kind = getattr(import_module(imported[owner.id][0]), imported[owner.id][1], None)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            values = {str(member.value) for member in kind}
            if method:
                tried: list[Any] = [*range(100)] if method == "from_int" else [member.name for member in kind]
                values = {str(each) for each in tried if _accepts(getattr(kind, method), each)}
            yield model.__mapper__.columns[argument.attr].name, values


def _accepts(convert: Callable[[Any], Any], value: Any) -> bool:
    try:
        convert(value)
    except Exception:
        return False
    return True


def query_stores(uri: str, artifact_root: str) -> dict[str, Any]:
    """Open the stores that the server opens, run queries, and read rows of every table as MLflow's objects. `answers`:
    number of results by kind; `unread`: a sentence for each kind that could not be read in full.

    Raises an error if a store does not open, or if PostgreSQL refuses a query: then the schema is not this release's.
    MLflow creates the default experiment of an empty database here, with its location below `artifact_root`. The stores
    without workspaces refuse a database that has any; those with workspaces search the default one."""
    everything: Any = import_module("mlflow.entities").ViewType.ALL
    if _has_workspaces(uri):
        os.environ["MLFLOW_ENABLE_WORKSPACES"] = "true"
        import_module("mlflow.utils.workspace_context").set_server_request_workspace("default")
        tracked: Any = import_module("mlflow.store.tracking.sqlalchemy_workspace_store").WorkspaceAwareSqlAlchemyStore
        registered: Any = import_module("mlflow.store.model_registry.sqlalchemy_workspace_store")
        tracking = tracked(uri, artifact_root)
        registry = registered.WorkspaceAwareSqlAlchemyStore(uri)
    else:
        tracking = import_module("mlflow.store.tracking.sqlalchemy_store").SqlAlchemyStore(uri, artifact_root)
        registry = import_module("mlflow.store.model_registry.sqlalchemy_store").SqlAlchemyStore(uri)
    names: list[str] = []

    def experiments() -> int:
        names.extend(each.experiment_id for each in tracking.search_experiments(everything, max_results=1000))
        return len(names)

    def runs() -> int:
        found = list(tracking.search_runs(names, "", everything, max_results=20)) if names else []
        for run in found:
            tracking.get_run(run.info.run_id)
        return len(found)

    def traces() -> int:
        return len(tracking.search_traces(names[:10], max_results=20)[0]) if names else 0

    def models() -> int:
        found = list(registry.search_registered_models(max_results=100))
        for model in found[:20]:
            registry.get_registered_model(model.name)
        return len(found)

    answers: dict[str, int] = {}
    unread: list[str] = []
    for query in (experiments, runs, traces, models):
        try:
            answers[query.__name__] = query()
        except Exception as error:
            if _is_of_the_database(error):
                raise
            unread.append(f"the search for {query.__name__} fails: {_sentence(error)}")
    unread += _unreadable_rows(uri)
    return {"answers": answers, "unread": unread}


def _has_workspaces(uri: str) -> bool:
    sqlalchemy: Any = import_module("sqlalchemy")
    engine = _engine(uri)
    with engine.connect() as connection:
        there = sqlalchemy.inspect(connection).has_table("workspaces")
        query = "SELECT count(*) FROM workspaces WHERE name <> 'default'"
        found = there and connection.execute(sqlalchemy.text(query)).scalar()
    engine.dispose()
    return bool(found)


def _unreadable_rows(uri: str) -> list[str]:
    """A sentence for each table with rows that the release's own models cannot turn into MLflow's objects. Encrypted
    columns are not read, as this process has no key."""
    orm: Any = import_module("sqlalchemy.orm")
    engine = _engine(uri)
    found = []
    with orm.Session(engine) as session:
        for model in sorted(_readable_models(), key=lambda model: str(model.__tablename__)):
            failed: list[str] = []
            encrypted = [a.key for a in model.__mapper__.column_attrs if hasattr(a.columns[0].type, "cipher")]
            hidden = [orm.defer(getattr(model, name)) for name in encrypted]
            try:
                for row in session.query(model).options(*hidden).limit(READ_AT_MOST):
                    for name in encrypted:
                        orm.attributes.set_committed_value(row, name, None)
                    if why := _why_unreadable(row):
                        key = "/".join(map(str, model.__mapper__.primary_key_from_instance(row)))
                        failed.append(f"{key} ({why})")
            except Exception as error:
                if _is_of_the_database(error):
                    raise
                failed.append(f"some rows ({_sentence(error)})")
            if failed:
                more = f" and {len(failed) - NAMED_AT_MOST} more" if len(failed) > NAMED_AT_MOST else ""
                found.append(f"{model.__tablename__}: {', '.join(failed[:NAMED_AT_MOST])}{more}")
    engine.dispose()
    return found


def _why_unreadable(row: Any) -> str | None:
    try:
        row.to_mlflow_entity()
    except Exception as error:
        if _is_of_the_database(error):
            raise
        return _sentence(error)
    return None


def _readable_models() -> set[Any]:
    """The classes of MLflow's tables that have an object in its interface."""
    every = {model for module in _models() for model in vars(module).values() if hasattr(model, "__mapper__")}
    return {model for model in every if hasattr(model, "to_mlflow_entity")}


def _models() -> list[Any]:
    found = []
    for name in MODELS:
        try:
            found.append(import_module(name))
        except ImportError:
            continue
    return found


def _is_of_the_database(error: BaseException | None) -> bool:
    """Whether SQLAlchemy raised the error, or one that it was raised from."""
    database_error: Any = import_module("sqlalchemy.exc").SQLAlchemyError
    while error is not None:
        if isinstance(error, database_error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _engine(uri: str) -> Any:
    import sqlalchemy

    # psycopg2 sends several UPDATEs of an executemany() at once; migrations update rows one by one.
    return sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool, executemany_mode="values_plus_batch")


TASKS: dict[str, Callable[..., Any]] = {
    "head": head,
    "create": create,
    "upgrade": upgrade,
    "enumerations": enumerations,
    "query_stores": query_stores,
}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_module("mlflow.store.tracking.sqlalchemy_store")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply: dict[str, Any] = {"result": TASKS[request["task"]](**request["arguments"])}
        except Exception as error:
            print(f"{request['task']}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
