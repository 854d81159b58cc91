"""Upgrades and rollbacks between any two releases, in any order, lose no logged data."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mlflow_host.postgres.catalog import BOOKKEEPING
from mlflow_host.postgres.cluster import connection, rows, value
from mlflow_host.schema.conversions import DERIVED, TRANSIENT
from mlflow_host.schema.verifying import row_counts
from tests.schema.environments import image, releases
from tests.schema.journey import Journey
from tests.schema.private_cluster import PrivateCluster

NOT_WRITTEN = DERIVED | TRANSIENT | {BOOKKEEPING, "trace_metrics", "span_metrics"}
"""Tables that may stay empty, because MLflow computes their rows, deletes their rows or no longer uses them. Since
3.17, MLflow stores the metrics of traces and spans in other tables."""

NEIGHBOURS = list(pairwise(releases()))
ENDS = (releases()[0], releases()[-1])
PAIRS = [
    pytest.param(*pair, id="-".join(pair), marks=() if pair == NEIGHBOURS[-1] else pytest.mark.slow)
    for one, other in [ENDS, *NEIGHBOURS]
    for pair in ((one, other), (other, one))
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_round_trips_with_writes_at_every_stop_lose_nothing(on_the_way: Journey, first: str, second: str) -> None:
    for version in (first, second, first, second):
        assert on_the_way.stop(image(version)) == []
    assert on_the_way.stop(image(first), write=False) == []


RDS_PAIRS = [
    pytest.param("rds", *pair, id="-".join(pair), marks=() if pair == NEIGHBOURS[-1] else pytest.mark.slow)
    for pair in [ENDS, *NEIGHBOURS]
]


@pytest.mark.parametrize(("server", "older", "newer"), RDS_PAIRS, indirect=["server"])
def test_rollback_and_upgrade_without_superuser_lose_nothing(
    on_the_way: Journey, server: PrivateCluster, older: str, newer: str
) -> None:
    for version in (newer, older):
        assert on_the_way.stop(image(version)) == []
    assert on_the_way.stop(image(newer), write=False) == []
    with connection(server.cluster) as opened:
        assert rows(opened, "SELECT rolname FROM pg_roles WHERE rolsuper") == [("rdsadmin",)]
        assert value(opened, "SELECT user") == "mlflow_host"
        owners = "SELECT DISTINCT pg_get_userbyid(datdba) FROM pg_database WHERE datname LIKE 'mlflow%'"
        assert rows(opened, owners) == [("mlflow",)]
    with connection(server.cluster, server.cluster.database) as opened:
        owners = "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        assert rows(opened, owners) == [("mlflow",)]


def test_every_table_of_the_newest_schema_is_filled_by_a_kind_of_object(on_the_way: Journey) -> None:
    """The other tests prove nothing about an empty table. If a new release has a new table, add a kind of object to
    scripts/drilling/mlflow_worker.py."""
    assert on_the_way.stop(image(releases()[-1])) == []
    with connection(on_the_way.cluster, on_the_way.cluster.database) as opened:
        counts = row_counts(opened)
    assert {table for table, count in counts.items() if not count} <= NOT_WRITTEN
    assert not NOT_WRITTEN - {BOOKKEEPING} - counts.keys(), "they are gone: shorten the list"
    _, written = on_the_way.expected.written[-1]
    spans = [span for trace in written["traces"].values() for span in trace["spans"]]
    assert sum(bool(span["links"]) for span in spans) == 2, "links between spans have no table of their own"
