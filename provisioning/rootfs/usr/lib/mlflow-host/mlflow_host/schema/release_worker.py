"""Worker process of `release.Release`: runs tasks with the MLflow that is installed for this Python interpreter.

The worker reads one JSON request per line from stdin and writes one JSON reply per line to stdout, until stdin ends.
Importing MLflow takes seconds, so the database step starts one worker early and sends all tasks to this worker.
This file imports only quick_migrations from mlflow_host: tests run it in virtual environments without mlflow_host.
"""

from __future__ import annotations

import ast
import enum
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

MODELS = (
    "mlflow.store.tracking.dbmodels.models",
    "mlflow.store.model_registry.dbmodels.models",
    "mlflow.store.workspace.dbmodels.models",
)
"""The modules that define MLflow's tables. Older releases lack some of these modules."""

READ_AT_MOST = 200
"""Maximum number of rows per table that `query_stores` converts to MLflow's objects."""

NAMED_AT_MOST = 3
"""Maximum number of unreadable rows per table that a message names."""


def head() -> str:
    utils: Any = import_module("mlflow.store.db.utils")
    return str(utils._get_latest_schema_revision())


def create(uri: str, revision: str) -> None:
    """Create tables in an empty database as MLflow's store does: the initial tables, then the migrations."""
    first_tables: Any = import_module("mlflow.store.tracking.dbmodels.initial_models")
    engine = _engine(uri)
    first_tables.Base.metadata.create_all(engine)
    engine.dispose()
    upgrade(uri, revision)


def upgrade(uri: str, revision: str) -> None:
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    utils: Any = import_module("mlflow.store.db.utils")
    quick = _quick_migrations()
    engine = _engine(uri)
    import_module("sqlalchemy").event.listen(engine, "before_execute", quick.compare_keys_as_rows, retval=True)
    config = utils._get_alembic_config(uri)
    script = ScriptDirectory.from_config(config)
    quick.quicken(script)

    def steps(current: Any, _: Any) -> Any:
        return script._upgrade_revs(revision, current)

    # These lines do the same as alembic's command.upgrade, but with the functions of quick_migrations.py.
    with engine.begin() as connection, EnvironmentContext(config, script, fn=steps, destination_rev=revision):
        config.attributes["connection"] = connection
        script.run_env()
    engine.dispose()


def _quick_migrations() -> Any:
    """Return the module quick_migrations. It imports no other module of mlflow_host, so the import works in a virtual
    environment that lacks mlflow_host."""
    sys.path.append(str(Path(__file__).parents[2]))
    return import_module("mlflow_host.schema.quick_migrations")


def enumerations() -> dict[str, list[str]]:
    """Return the values that MLflow accepts in each enumeration column; the keys are "table.column". MLflow's models
    convert enumeration columns, for example by `JobStatus.from_int(self.status)`, and fail for other values."""
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
    """Find the calls in a model's source code that convert a column to an enumeration. Yields (column, values)."""
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
    """Open the server's stores, run queries, and convert rows of each table to MLflow's objects. Returns `answers`, the
    number of results by kind, and `unread`, a sentence for each failed search and for each table with rows that MLflow
    could not read.

    Raises an error if a store does not open, or if PostgreSQL rejects a query, because the schema is then wrong. If the
    database is empty, MLflow creates the default experiment, with its artifacts below `artifact_root`. For a database
    with workspaces, MLflow's workspace stores are used, and they search only the default workspace."""
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
    """Return a sentence for each table with rows that MLflow's models cannot convert to MLflow's objects. Encrypted
    columns are not read, because this process has no key for them."""
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
    """Return the model classes whose rows MLflow can convert to objects of its Python API."""
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
    """Return whether SQLAlchemy raised this error or an error in its chain of causes."""
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

    # Migrations update rows with executemany(). In the mode values_plus_batch, one round trip sends many UPDATEs.
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
