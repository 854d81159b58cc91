"""Resolve conflicts: if the database in service already uses the ID or name of an adopted object, choose another ID or
name.

Objects with a random ID keep their ID. If this server already has an object with the same random ID, it is the same
object from an earlier adoption. A later adoption uses the tag ADOPTED_TAG to find an experiment of an earlier adoption,
and the name and creation time to find a registered model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from psycopg2 import sql
from psycopg2.extras import execute_values

from mlflow_host.adopt.merge import is_empty
from mlflow_host.adopt.staging import SCHEMA
from mlflow_host.contract.adoption import ADOPTED_TAG, Manifest, Request
from mlflow_host.postgres.catalog import Catalog
from mlflow_host.postgres.cluster import rows, run, value

MOST = 2**31
"""Limit of experiment IDs, which are 32-bit integers in PostgreSQL. MLflow's FileStore has longer IDs."""
DEFAULT = "Default"


@dataclass(frozen=True)
class Live:
    """IDs and names in the database in service, which can conflict with IDs and names of the source."""

    experiments: dict[int, str]
    adopted: dict[str, int]
    """Experiment ID in the source → experiment ID on this server, for experiments of an earlier adoption."""
    models: dict[str, int | None]
    """Name of a registered model → its creation time."""
    empty: bool


@dataclass
class Settlement:
    """ID or name in the source → new ID or name. None: `--on-clash skip` leaves the object out."""

    experiments: dict[str, int | None] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Experiment ID in the source → name of the experiment on this server."""
    models: dict[str, str | None] = field(default_factory=dict)
    clashes: list[dict[str, str]] = field(default_factory=list)
    default_is_ours: bool = False
    """Whether the source's experiment 0 is merged into this server's experiment 0, which keeps its own values."""


def read_live(opened: Any, source: str) -> Live:
    experiments = dict(rows(opened, "SELECT experiment_id, name FROM experiments"))
    tags = rows(opened, "SELECT value, experiment_id FROM experiment_tags WHERE key = %s", (ADOPTED_TAG,))
    ours = {text.partition(":")[2]: number for text, number in tags if text.partition(":")[0] == source}
    models = dict(rows(opened, "SELECT name, creation_time FROM registered_models"))
    return Live(experiments, ours, models, is_empty(opened))


def settle(opened: Any, source: str, request: Request, live: Live, reserved: dict[str, int], fresh: Any) -> Settlement:
    """Choose IDs and names. `reserved` contains the IDs of an interrupted adoption, and `fresh` yields unused IDs."""
    made = Settlement()
    taken_ids = set(live.experiments)
    here = {name: number for number, name in live.experiments.items()}
    found = rows(opened, f"SELECT experiment_id, name FROM {SCHEMA}.experiments ORDER BY length(experiment_id), 1")
    kept = {int(old) for old, _ in found if _fits(old)}
    used = taken_ids | kept | set(reserved.values())
    for old, name in found:
        known = live.adopted.get(old)
        if known is None and old == "0" and name == DEFAULT and 0 in live.experiments and not request.prefix:
            if not live.empty:
                made.experiments[old], made.names[old], made.default_is_ours = 0, live.experiments[0], True
                continue
            known = 0
        elif known is None and old == "0" and live.empty:
            known = 0
        new = f"{request.prefix}{name}"
        owner = here.get(new)
        if owner is not None and owner not in (known, *((0,) if live.empty else ())):
            settled = _clash(made, "experiment", new, request)
            if settled == "skip":
                made.experiments[old] = None
                continue
            taken = {each for each, number in here.items() if number != known}
            new = _other(f"{new} ({source})", taken | set(made.names.values()))
        made.names[old] = new
        if known is not None:
            made.experiments[old] = known
        elif old in reserved and reserved[old] not in taken_ids:
            made.experiments[old] = reserved[old]
        elif _fits(old) and int(old) not in taken_ids:
            made.experiments[old] = int(old)
        else:
            made.experiments[old] = next(number for number in fresh if number not in used)
            used.add(made.experiments[old] or 0)
    prefix = request.prefix.replace("/", "-").replace(":", "-")
    for name, created in _models(opened):
        new = f"{prefix}{name}"
        if new in live.models and live.models[new] != created:
            settled = _clash(made, "registered model", new, request)
            if settled == "skip":
                made.models[name] = None
                continue
            new = _other(f"{new}-{source}", {each for each, at in live.models.items() if at != created})
        made.models[name] = new
    return made


def _models(opened: Any) -> list[tuple[str, int | None]]:
    if value(opened, "SELECT to_regclass(%s) IS NULL", (f"{SCHEMA}.registered_models",)):
        return []
    found = rows(opened, f"SELECT name, creation_time FROM {SCHEMA}.registered_models ORDER BY name")
    return [(name, int(created) if (created or "").isdigit() else None) for name, created in found]


def _fits(old: str) -> bool:
    return old.isascii() and old.isdigit() and int(old) < MOST


def _clash(made: Settlement, kind: str, name: str, request: Request) -> str:
    made.clashes.append({"kind": kind, "name": name, "settled": request.on_clash})
    return request.on_clash


def _other(name: str, taken: set[str]) -> str:
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if n not in taken)


def fresh_ids(live: Any, *, reserve: bool) -> Any:
    """An iterator of unused experiment IDs. With `reserve`, the IDs come from PostgreSQL's sequence, so no other
    experiment gets these IDs."""
    sequence = value(live, "SELECT pg_get_serial_sequence('experiments', 'experiment_id')")
    if reserve:
        return (int(value(live, "SELECT nextval(%s::regclass)", (sequence,))) for _ in itertools.count())
    return itertools.count(int(value(live, f"SELECT last_value FROM {sequence}")) + 1)


def reserve_kept(live: Any, settled: Settlement) -> None:
    """Advance the sequence beyond the IDs of the adopted experiments, so that no new experiment gets the same ID."""
    sequence = value(live, "SELECT pg_get_serial_sequence('experiments', 'experiment_id')")
    highest = max((number for number in settled.experiments.values() if number), default=0)
    run(live, f"SELECT setval(%s::regclass, greatest(%s, last_value)) FROM {sequence}", (sequence, max(highest, 1)))


def apply(opened: Any, manifest: Manifest, catalog: Catalog, settled: Settlement) -> None:
    """Write the new IDs and names into all staged rows that contain the old IDs and names.

    Skipped experiments get negative IDs. `delete_skipped` deletes the skipped experiments after all rows are in their
    tables.
    """
    skipped = itertools.count(1)
    ids = [
        (old, str(-next(skipped) if new is None else new))
        for old, new in settled.experiments.items()
        if new is None or str(new) != old
    ]
    if ids:
        _mapping(opened, "ids", ids)
        for name, table in manifest.tables.items():
            if "experiment_id" in table.columns:
                _map(opened, name, "experiment_id", "ids")
        if "entity_associations" in manifest.tables:
            for side in ("source", "destination"):
                _map(opened, "entity_associations", f"{side}_id", "ids", f"t.{side}_type = 'experiment'")
    names = [(old, name) for old, name in settled.names.items()]
    _mapping(opened, "names", [(str(settled.experiments[old]), name) for old, name in names])
    run(
        opened,
        f"UPDATE {SCHEMA}.experiments t SET name = m.new FROM {SCHEMA}.names m WHERE t.experiment_id = m.old "
        "AND t.name IS DISTINCT FROM m.new",
    )
    renamed = [(old, new) for old, new in settled.models.items() if new is not None and new != old]
    if renamed:
        _mapping(opened, "models", renamed)
        for each, column in _columns_of_models(catalog):
            if each in manifest.tables and column in manifest.tables[each].columns:
                _map(opened, each, column, "models")
        _rename_in_texts(opened, manifest, renamed)


def _mapping(opened: Any, name: str, pairs: list[tuple[str, str]]) -> None:
    run(opened, f"CREATE TABLE {SCHEMA}.{name} (old text PRIMARY KEY, new text NOT NULL)")
    with opened.cursor() as cursor:
        execute_values(cursor, f"INSERT INTO {SCHEMA}.{name} VALUES %s", pairs)


def _map(opened: Any, table: str, column: str, mapping: str, condition: str = "true") -> None:
    names = {"t": sql.Identifier(SCHEMA, table), "c": sql.Identifier(column), "m": sql.Identifier(SCHEMA, mapping)}
    statement = "UPDATE {t} t SET {c} = m.new FROM {m} m WHERE t.{c} = m.old AND "
    run(opened, sql.SQL(statement).format(**names) + sql.SQL(condition))


def _columns_of_models(catalog: Catalog) -> set[tuple[str, str]]:
    """(table, column) of all columns that contain the name of a registered model."""
    found = {("registered_models", "name")}
    while True:
        more = {
            (reference.table, here)
            for reference in catalog.foreign_keys
            for here, there in zip(reference.columns, reference.parent_columns, strict=True)
            if (reference.parent, there) in found
        }
        if more <= found:
            return found
        found |= more


def _rename_in_texts(opened: Any, manifest: Manifest, renamed: list[tuple[str, str]]) -> None:
    """Replace names in `models:/NAME/…` and `models:/NAME@…` in the sources of model versions, and in the prompt links
    of runs and traces."""
    for old, new in renamed:
        for column in ("source", "storage_location"):
            if column in manifest.tables.get("model_versions", manifest.tables["experiments"]).columns:
                for sign in "/@":
                    change = (f"models:/{old}{sign}", f"models:/{new}{sign}")
                    run(
                        opened,
                        f"UPDATE {SCHEMA}.model_versions SET {column} = %s || substr({column}, %s) "
                        f"WHERE starts_with({column}, %s)",
                        (change[1], len(change[0]) + 1, change[0]),
                    )
        for table in ("tags", "trace_tags"):
            if table in manifest.tables:
                run(
                    opened,
                    f"UPDATE {SCHEMA}.{table} SET value = replace(value, %s, %s) WHERE key = 'mlflow.linkedPrompts'",
                    (f'"name": "{old}"', f'"name": "{new}"'),
                )


def delete_skipped(opened: Any, settled: Settlement) -> None:
    run(opened, "DELETE FROM experiments WHERE experiment_id < 0")
    gone = [name for name, new in settled.models.items() if new is None]
    if gone:
        run(opened, "DELETE FROM registered_models WHERE name = ANY (%s)", (gone,))
