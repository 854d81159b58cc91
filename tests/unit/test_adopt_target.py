"""adopt.py starts the machine's unit until the unit reports the request, because systemd may ignore a start. The
machine keeps the verdict."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.adopt import run
from mlflow_host.contract import adoption
from mlflow_host.contract.adoption import AdoptionError, Request
from mlflow_host.postgres import dump_file
from mlflow_host.postgres.cluster import Cluster
from mlflow_host.schema.release import ImageSchema
from scripts.adopting import target


class Objects:
    """The backups bucket."""

    class exceptions:
        class NoSuchKey(Exception): ...

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def put_object(self, Bucket: str, Key: str, Body: bytes) -> None:
        self.held[Key] = Body

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        if Key not in self.held:
            raise self.exceptions.NoSuchKey
        return {"Body": io.BytesIO(self.held[Key])}


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock, so that the waits of adopt.py take no time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def machine(objects: Objects, ignored: int) -> tuple[target.Target, list[str]]:
    """Return a machine whose unit is stopping after an earlier request and ignores the first `ignored` starts."""
    starts: list[str] = []

    def start(name: str) -> None:
        starts.append(name)
        request = json.loads(objects.held[adoption.key(name, "request.json")])["id"]
        wrong = "of-the-request-before"
        status = {"request": wrong if len(starts) <= ignored else request, "at": "now", "state": "done", "message": ""}
        objects.held[adoption.key(name, "status.json")] = json.dumps(status).encode()

    api: Any = None
    return target.Target(objects, {"backups": "b"}, start, api, str), starts


@pytest.mark.parametrize("ignored", [0, 1, 3])
def test_start_is_repeated_until_the_unit_reports_the_request(waited: list[float], ignored: int) -> None:
    stack, starts = machine(Objects(), ignored)
    stack.run("old", Request("", "load"), print)
    assert starts == ["old"] * (ignored + 1)
    assert waited[0] < target.SILENT_SECONDS


def test_unit_that_never_reports_is_named(waited: list[float]) -> None:
    stack, _ = machine(Objects(), 10**6)
    with pytest.raises(AdoptionError, match="mlflow-host-adopt@old"):
        stack.run("old", Request("", "load"), print)


def test_verdict_replaces_the_report_of_the_load_on_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects, file = Objects(), "20261130T000000Z-adoption-old.json"
    monkeypatch.setattr(dump_file, "s3_client", lambda bucket: objects)
    bucket, unused = dump_file.Bucket("b", "eu-central-1", ""), Path()
    settings = run.AdoptSettings(Cluster(host=""), ImageSchema(unused, "", 0, "", ""), bucket, tmp_path, None)
    for name, content in (
        ("request.json", adoption.dump(Request("1", "report"))),
        ("loaded.json", json.dumps({"file": file}).encode()),
        (f"report-{file}", b'{"kinds": []}'),
    ):
        objects.put_object("b", adoption.key("old", name), content)
    (tmp_path / file).write_text("of the load")
    run.perform(settings, "old")
    assert (tmp_path / file).read_text() == '{"kinds": []}'
    assert json.loads(objects.held[adoption.key("old", "status.json")])["state"] == "done"
