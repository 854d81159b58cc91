"""Our faster use of database connections is safe: dead connections are replaced, and a read after a write returns the
written data."""

from collections.abc import Iterator

import pytest
import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from mlflow_host.server import db_connections
from tests.support import services

pytestmark = pytest.mark.service

ON_SOCKET = "postgresql+psycopg2:///mlflow?host=/run/postgresql"


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.PostgreSQL]:
    with services.postgresql(tmp_path_factory.mktemp("cluster") / "postgresql") as running:
        running.execute("create database mlflow")
        yield running


@pytest.fixture
def engine(cluster: services.PostgreSQL) -> Iterator[sqlalchemy.Engine]:
    made = sqlalchemy.create_engine(cluster.uri(), plugins=[db_connections.PLUGIN], pool_pre_ping=True)
    Base.metadata.drop_all(made)
    Base.metadata.create_all(made)
    for name, function in (
        ("after_begin", db_connections.note_connection),
        ("before_commit", db_connections.expire_after_writes),
    ):
        event.listen(Session, name, function)
    with Session(made) as session:
        session.add(Row(id=1, value=1))
        session.commit()
    yield made
    for name, function in (
        ("after_begin", db_connections.note_connection),
        ("before_commit", db_connections.expire_after_writes),
    ):
        event.remove(Session, name, function)
    made.dispose()


def test_only_postgresql_on_a_socket_uses_the_plugin() -> None:
    assert db_connections.through_plugin(ON_SOCKET) == f"{ON_SOCKET}&plugin=mlflow-host"
    for other in ("sqlite:////tmp/mlflow.db", "postgresql+psycopg2://mlflow@db.example.com/mlflow"):
        assert db_connections.through_plugin(other) == other


def test_the_plugin_is_found_by_the_name_in_the_uri(cluster: services.PostgreSQL) -> None:
    engine = sqlalchemy.create_engine(f"{cluster.uri()}&plugin={db_connections.PLUGIN}", pool_pre_ping=True)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    assert engine.pool._pre_ping is False


def test_closed_connections_are_replaced(engine: sqlalchemy.Engine, cluster: services.PostgreSQL) -> None:
    held = [engine.connect() for _ in range(3)]
    for connection in held:
        connection.close()
    others = "pid <> pg_backend_pid() and datname = 'mlflow'"
    cluster.execute(f"select pg_terminate_backend(pid, 5000) from pg_stat_activity where {others}")
    for _ in range(5):
        with engine.connect() as connection:
            assert connection.scalar(text("select 1")) == 1


def test_after_a_transaction_that_only_read_objects_keep_their_values(engine: sqlalchemy.Engine) -> None:
    with Session(engine) as session:
        row = session.get(Row, 1)
        session.commit()
        assert row not in session.dirty and "value" in row.__dict__


@pytest.mark.parametrize("how", ["flush", "pending", "statement", "bulk"])
def test_objects_are_reloaded_after_a_write(engine: sqlalchemy.Engine, how: str) -> None:
    with Session(engine) as session:
        row = session.get(Row, 1)
        assert row is not None
        if how == "statement":
            session.execute(text("update rows set value = 2"))
        elif how == "bulk":
            session.bulk_save_objects([Row(id=7, value=7)])
        else:
            row.value = 2
            if how == "flush":
                session.flush()
        session.commit()
        assert "value" not in row.__dict__
        assert row.value == (1 if how == "bulk" else 2)


def test_reads_after_a_write_use_a_new_transaction(engine: sqlalchemy.Engine) -> None:
    with Session(engine) as session:
        row = session.get(Row, 1)
        assert row is not None
        row.value = 2
        session.commit()
        assert row.value == 2  # this read begins a second transaction
        session.commit()
        assert "value" in row.__dict__
