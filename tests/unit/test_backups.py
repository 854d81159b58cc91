"""Test backups without a machine: pgBackRest's configuration, due times, stale backups, archiving, restore requests."""

from __future__ import annotations

import configparser
import dataclasses
import json
import re
import struct
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.backups import archive, base_backup, check, dump, restore, restore_choice
from mlflow_host.backups.check import SegmentQueue
from mlflow_host.backups.last_runs import LastRuns, is_due, stamp
from mlflow_host.backups.restore_choice import BaseBackup, Dump, RecoveryPoint, RecoveryPoints, StanzaRange
from mlflow_host.contract import launch, restore_request, sizing
from mlflow_host.machine import config, nginx
from mlflow_host.machine.status import step
from mlflow_host.postgres import dump_file, pgbackrest
from mlflow_host.postgres.pgbackrest import BackupError, Repository, Stanza

ROOTFS = Path(__file__).parents[2] / "provisioning" / "rootfs"
NOW = datetime(2026, 11, 22, 14, 15, tzinfo=UTC)
OURS = Stanza(15, 7711001897250578601, datetime(2026, 11, 1, 8, tzinfo=UTC))
AUTHORITY = "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIUQ==\n-----END CERTIFICATE-----\n"


def document(**backups: Any) -> launch.LaunchDocument:
    return launch.from_mapping(
        {
            "format": 1,
            "stack": {"name": "dev", "region": "eu-central-1"},
            "buckets": {"artifacts": "aaa", "models": "mmm", "backups": "bbb"},
            "credentials": {"parameter": "/x"},
            "data_volume": {"id": "vol-01234567"},
            "web": {"hostnames": ["127.0.0.1"]},
            "backups": backups,
        }
    )


def rendered(monkeypatch: pytest.MonkeyPatch, **backups: Any) -> configparser.ConfigParser:
    monkeypatch.setattr(nginx, "TEMPLATES", ROOTFS / "usr/share/mlflow-host/templates")
    host = config.host_config(document(**backups), sizing.size(sizing.MachineSize(2048, 2)))
    parser = configparser.ConfigParser()
    parser.read_string(pgbackrest.settings(host))
    return parser


# Configuration


def test_pgbackrest_uses_aws_with_the_instance_role(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rendered(monkeypatch, retention_days=7)["global"]
    assert found["repo1-s3-endpoint"] == "s3.eu-central-1.amazonaws.com"
    assert (found["repo1-s3-bucket"], found["repo1-s3-region"]) == ("bbb", "eu-central-1")
    assert found["repo1-s3-key-type"] == "auto"
    assert (found["repo1-retention-full"], found["repo1-retention-full-type"]) == ("7", "time")
    assert not [key for key in found if "secret" in key or "path-style" in key or "ca-file" in key or "port" in key]


def test_pgbackrest_uses_another_endpoint_with_its_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rendered(monkeypatch, endpoint="https://store.internal:9000", authority=AUTHORITY)["global"]
    assert (found["repo1-s3-endpoint"], found["repo1-storage-port"]) == ("store.internal", "9000")
    assert found["repo1-s3-uri-style"] == "path"
    assert found["repo1-storage-ca-file"] == str(pgbackrest.AUTHORITY)


def test_pgbackrest_cannot_archive_to_a_plain_http_endpoint() -> None:
    assert pgbackrest.archives(document())
    assert pgbackrest.archives(document(endpoint="https://store"))
    assert not pgbackrest.archives(document(endpoint="http://store"))


def test_archive_command_exists_and_contains_the_word_pgbackrest() -> None:
    """pgBackRest's `backup` command checks the archive_command, and refuses a command without the word "pgbackrest"."""
    template = (ROOTFS / "usr/share/mlflow-host/templates/postgresql.conf.j2").read_text()
    (command,) = re.findall(r"^archive_command = '(.+)'$", template, re.MULTILINE)
    (script,) = [part for part in command.split() if part.endswith(".py")]
    assert "pgbackrest" in command
    assert (ROOTFS / script.lstrip("/")).is_file()


def test_backups_authority_requires_an_https_endpoint() -> None:
    with pytest.raises(launch.LaunchError, match=r"backups\.authority is set but backups\.endpoint is not an https"):
        document(authority=AUTHORITY)


# Stanzas and due times


def test_new_cluster_gets_a_new_stanza(tmp_path: Path) -> None:
    (tmp_path / "global").mkdir()
    (tmp_path / "global/pg_control").write_bytes(struct.pack("=Q", OURS.system) + bytes(8184))
    (tmp_path / "PG_VERSION").write_text("15\n")
    assert pgbackrest.stanza_of(tmp_path) is None
    assert pgbackrest.start_stanza(tmp_path, OURS.began) == OURS == pgbackrest.stanza_of(tmp_path)
    assert OURS.name == "pg15-7711001897250578601-20261101T080000Z"
    assert pgbackrest.parse_stanza("main") is None


@pytest.mark.parametrize(
    ("hours", "now", "due"),
    [
        (None, NOW, True),
        (1, NOW, False),
        (25, NOW, False),
        (26, NOW, True),
        (19, NOW.replace(hour=2), False),
        (20, NOW.replace(hour=2), True),
    ],
)
def test_nightly_backup_is_due_at_night_or_after_26_hours(hours: int | None, now: datetime, due: bool) -> None:
    assert is_due(now - timedelta(hours=hours) if hours is not None else None, now) is due


def backed_up(folder: Path, *, ago: timedelta, full_ago: timedelta, stanza: Stanza = OURS) -> LastRuns:
    history = LastRuns(folder)
    content = {"stanza": stanza.name, "at": stamp(NOW - ago), "full_at": stamp(NOW - full_ago)}
    history.write("base", content)
    return history


def test_first_base_backup_of_a_stanza_is_full(tmp_path: Path) -> None:
    month = timedelta(days=30)
    assert base_backup.kind_due(LastRuns(tmp_path), OURS, month, NOW) == "full"
    history = backed_up(tmp_path, ago=timedelta(hours=1), full_ago=timedelta(hours=1))
    assert base_backup.kind_due(history, OURS, month, NOW) is None
    restored = Stanza(OURS.major, OURS.system, NOW)
    assert base_backup.kind_due(history, restored, month, NOW) == "full"


def test_base_backup_is_full_once_a_week_and_after_a_gap(tmp_path: Path) -> None:
    month, day = timedelta(days=30), timedelta(days=1)
    history = backed_up(tmp_path, ago=timedelta(hours=27), full_ago=3 * day)
    assert base_backup.kind_due(history, OURS, month, NOW) == "diff"
    assert base_backup.kind_due(history, OURS, 2 * day, NOW) == "full", (
        "a shorter retention needs full backups more often"
    )
    history = backed_up(tmp_path, ago=timedelta(hours=27), full_ago=8 * day)
    assert base_backup.kind_due(history, OURS, month, NOW) == "full"
    history = backed_up(tmp_path, ago=timedelta(hours=1), full_ago=day)
    history.write("gap", {"at": stamp(NOW - timedelta(minutes=5)), "stanza": OURS.name})
    assert base_backup.kind_due(history, OURS, month, NOW) == "full"


@pytest.mark.parametrize(
    ("arguments", "due", "called"),
    [([], False, "manual"), ([], True, "manual"), (["--if-due"], True, "nightly"), (["--if-due"], False, None)],
)
def test_dump_is_named_for_its_occasion(
    arguments: list[str],
    due: bool,
    called: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    taken: list[str] = []
    monkeypatch.setattr("sys.argv", ["mlflow-host-dump", *arguments])
    monkeypatch.setattr(dump, "LastRuns", lambda: LastRuns(Path("nowhere")))
    monkeypatch.setattr(dump, "is_due", lambda last, now: due)
    monkeypatch.setattr(
        config, "load", lambda: config.HostConfig(document(), sizing.size(sizing.MachineSize(2048, 2)), "")
    )

    def take(cluster: Any, bucket: Any, history: Any, now: datetime, occasion: str) -> str:
        taken.append(occasion)
        return "s3://x"

    monkeypatch.setattr(dump, "take", take)
    monkeypatch.setattr(dump, "expire", lambda bucket, retention, now: [])
    assert dump.main() == 0
    assert taken == [called] * bool(called)
    assert ("dumped to s3://x" in capsys.readouterr().out) == bool(called)


@pytest.mark.parametrize("argument", ["--help", "--now", "tomorrow"])
def test_help_and_invalid_arguments_take_no_dump(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mlflow-host-dump", argument])
    monkeypatch.setattr(dump, "take", lambda *_: pytest.fail("a dump was taken"))
    with pytest.raises(SystemExit) as ended:
        dump.main()
    assert ended.value.code == (0 if argument == "--help" else 2)


def test_commands_pass_their_arguments_to_python() -> None:
    commands = sorted((ROOTFS / "usr/bin").iterdir())
    assert [each.name for each in commands] == ["mlflow-host-dump", "mlflow-host-gc", "mlflow-host-restore"]
    for each in commands:
        assert each.read_text().endswith(' "$@"\n'), each.name


def test_outdated_dumps_are_deleted_but_never_the_newest() -> None:
    ages = [50, 40, 31, 30, 1]
    found = [(NOW - timedelta(days=days), f"dumps/{days}.dump") for days in ages]
    assert dump.beyond(found, timedelta(days=30), NOW) == ["dumps/50.dump", "dumps/40.dump", "dumps/31.dump"]
    assert dump.beyond(found[:1], timedelta(days=30), NOW) == []
    assert dump.beyond([], timedelta(days=30), NOW) == []


class Listing:
    """A stand-in for boto3's S3 client. Its bucket contains one object per key in `keys`, and all objects are a year
    old."""

    def __init__(self, *keys: str):
        self.contents = [{"Key": key, "LastModified": NOW - timedelta(days=365), "Size": 1} for key in keys]
        self.deleted: list[str] = []

    def get_paginator(self, operation: str) -> Any:
        return self

    def paginate(self, **_: str) -> list[dict[str, Any]]:
        return [{"Contents": self.contents}]

    def delete_object(self, Bucket: str, Key: str) -> None:
        self.deleted.append(Key)


NIGHTLY = "20261122T013300Z-nightly-f4a9b2c7d1e6.dump"
PLANTED = [
    f"dumps/{'0' * 32}/artifacts/20991231T000000Z-nightly-f4a9b2c7d1e6.dump",
    "dumps/zzz.dump",
    f"dumps/{NIGHTLY}.dump",
    f"dumps/x/{NIGHTLY}",
    f"dumps/{NIGHTLY}\n",
]


def test_only_dumps_of_ours_directly_below_dumps_are_listed_and_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [f"dumps/{NIGHTLY}", "dumps/20261123T013300Z-before-change-None.dump", "dumps/20261124T013300Z-gc-abc.dump"]
    store = Listing(*ours, f"{ours[0]}.sha256", *PLANTED)
    there = restore_choice.list_recovery_points(None, store, "bbb")
    assert [each.key for each in there.dumps] == ours
    assert [each.recorded for each in there.dumps] == [True, False, False]
    monkeypatch.setattr(dump_file, "s3_client", lambda bucket: store)
    dump.expire(dump_file.Bucket("bbb", "eu-central-1"), timedelta(days=30), NOW)
    newest = max(ours)
    assert store.deleted == [key for each in sorted(ours) if each != newest for key in (each, f"{each}.sha256")]


@pytest.mark.parametrize("key", PLANTED)
def test_a_planted_dump_is_chosen_neither_by_age_nor_by_name(key: str) -> None:
    there = restore_choice.list_recovery_points(None, Listing(key, f"{key}.sha256"), "bbb")
    for value in ("latest", key):
        with pytest.raises(BackupError):
            restore_choice.choose(value, there, 15, None, NOW)


def test_a_dump_without_a_digest_is_restored_by_its_name_only() -> None:
    old, new = DUMPS[0], dataclasses.replace(DUMPS[1], recorded=False)
    there = RecoveryPoints((), (old, new))
    assert restore_choice.choose("latest", there, 15, None, NOW).dump == old
    assert restore_choice.choose(new.key, there, 15, None, NOW).dump == new
    assert "no digest" in restore_choice.table(there)[2] and "no digest" not in restore_choice.table(there)[1]
    with pytest.raises(BackupError, match="nothing to restore"):
        restore_choice.choose("latest", RecoveryPoints((), (new,)), 15, None, NOW)


# Stale backups


def good(folder: Path) -> LastRuns:
    history = backed_up(folder, ago=timedelta(hours=20), full_ago=timedelta(hours=20))
    history.write("dump", {"at": stamp(NOW - timedelta(hours=20))})
    history.write("archive", {"at": stamp(NOW - timedelta(days=3)), "segment": "0" * 24})
    return history


NONE = SegmentQueue()


def problems(history: LastRuns, queue: SegmentQueue = NONE, *, archiving: bool = True) -> list[str]:
    found = check.summary(history, OURS, queue, NOW, archiving, booted=NOW - timedelta(days=30))
    assert found["state"] == ("late" if found["problems"] else "good")
    return list(found["problems"])


def test_recent_backups_and_an_empty_queue_are_no_problem(tmp_path: Path) -> None:
    """An idle database writes no log segment, so the age of the last archived segment is not a problem."""
    assert problems(good(tmp_path)) == []
    assert problems(good(tmp_path), SegmentQueue(1, NOW - timedelta(seconds=110))) == []


def test_just_booted_machine_reports_only_segments_that_wait_since_the_boot(tmp_path: Path) -> None:
    """A machine reports a broken archive within minutes of its boot. The machine has time to take overdue backups
    before it reports stale backups."""
    old = good(tmp_path)
    old.write("dump", {"at": stamp(NOW - timedelta(days=9))})
    queue = SegmentQueue(3, NOW - timedelta(days=9))

    def seen(booted: timedelta) -> dict[str, Any]:
        return check.summary(old, OURS, queue, NOW, True, booted=NOW - booted)

    found = seen(timedelta(seconds=110))
    assert (found["state"], found["problems"], found["segments_waiting"]) == ("good", [], 3)
    assert found["dump"] == {"at": stamp(NOW - timedelta(days=9))}
    (late,) = seen(timedelta(minutes=3))["problems"]
    assert late.startswith("3 segments of the write-ahead log wait")
    assert len(seen(timedelta(minutes=11))["problems"]) == 2


def test_each_stale_backup_is_one_sentence(tmp_path: Path) -> None:
    (late,) = problems(good(tmp_path), SegmentQueue(3, NOW - timedelta(minutes=50)))
    assert late.startswith("3 segments of the write-ahead log wait to be archived, the oldest for 50 minutes")
    good(tmp_path).write("dump", {"at": stamp(NOW - timedelta(hours=37))})
    (late,) = problems(LastRuns(tmp_path))
    assert late.startswith(
        "the last dump is 37 hours old, of 2026-11-21T01:15:00Z: see `journalctl -u mlflow-host-dump`"
    )
    (tmp_path / "dump.json").unlink()
    (late,) = problems(LastRuns(tmp_path))
    assert late.startswith("there is no dump yet")
    backed_up(tmp_path, ago=timedelta(hours=37), full_ago=timedelta(hours=37))
    assert [each.split(" is ")[0] for each in problems(LastRuns(tmp_path))] == ["there", "the last base backup"]


def test_gap_is_reported_until_the_next_base_backup(tmp_path: Path) -> None:
    history = good(tmp_path)
    history.write("gap", {"at": stamp(NOW - timedelta(hours=1)), "stanza": OURS.name})
    (late,) = problems(history)
    assert "the archived write-ahead log has a gap at 2026-11-22T13:15:00Z" in late
    backed_up(tmp_path, ago=timedelta(minutes=1), full_ago=timedelta(minutes=1))
    assert problems(history) == []


def test_plain_http_endpoint_is_reported(tmp_path: Path) -> None:
    (problem,) = problems(good(tmp_path), archiving=False)
    assert "set backupsEndpoint to an https:// address" in problem


# Archiving


def test_archive_command_returns_the_reply_of_the_archive_service(tmp_path: Path) -> None:
    """The test runs the archive command as PostgreSQL does, with a socket that the service's own function opens."""
    path = tmp_path / "s"
    program = (ROOTFS / "usr/lib/mlflow-host/mlflow_host/backups/pgbackrest_archive_command.py").read_text()
    here = tmp_path / "ask.py"
    here.write_text(program.replace("/run/mlflow-host/backups/archive.sock", str(path)))
    answers = iter(["", "the bucket is out of reach"])
    with archive.listening(path) as listener:
        assert path.stat().st_mode & 0o777 == 0o600

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    assert connection.makefile("r").readline() == "pg_wal/000000010000000000000001\n"
                    connection.sendall(f"{answer}\n".encode())

        threading.Thread(target=serve, daemon=True).start()
        command = [sys.executable, "-I", "-S", str(here), "pg_wal/000000010000000000000001"]
        assert subprocess.run(command, capture_output=True).returncode == 0
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode == 1
        assert "000000010000000000000001 is not archived: the bucket is out of reach" in refused.stderr
    absent = subprocess.run(command, capture_output=True, text=True)
    assert absent.returncode == 1 and "the archive service does not answer" in absent.stderr


@pytest.mark.parametrize("segment", ["", "../../etc/passwd", "pg_wal/../../x", "base/1"])
def test_only_wal_segments_are_archived(tmp_path: Path, segment: str) -> None:
    assert "is not a segment of the write-ahead log" in archive.push(
        Repository(tmp_path), LastRuns(tmp_path), segment, 1
    )


def waits(cluster: Path, segments: int) -> None:
    """Create finished log segments of 1 KiB, with the status files that PostgreSQL writes."""
    (cluster / "pg_wal/archive_status").mkdir(parents=True)
    (cluster / pgbackrest.STANZA_FILE).write_text(f"{OURS.name}\n")
    for number in range(1, segments + 1):
        (cluster / f"pg_wal/{number:024X}").write_bytes(bytes(1024))
        (cluster / f"pg_wal/archive_status/{number:024X}.ready").touch()
    (cluster / f"pg_wal/archive_status/{1:024X}.backup.done").touch()


def test_unreachable_bucket_never_fills_the_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments wait for the bucket up to a total size. Above this size, the service skips segments, records a gap in
    the archived log, and tries to upload one segment per minute."""
    tried: list[str] = []

    def dead(where: Repository, stanza: Stanza, segment: str) -> str:
        tried.append(segment)
        return "the bucket is out of reach"

    monkeypatch.setattr(archive, "push_once", dead)
    waits(tmp_path, 3)
    (tmp_path / "history").mkdir()
    here, history = Repository(tmp_path), LastRuns(tmp_path / "history")
    assert archive.waiting_bytes(tmp_path) == 3072
    first, second, third = (f"pg_wal/{number:024X}" for number in (1, 2, 3))
    assert archive.push(here, history, first, 4096, NOW) == "the bucket is out of reach"
    assert history.read("gap") == {}, "the queue is below its limit"
    assert archive.push(here, history, first, 2048, NOW) == ""
    assert history.read("gap") == {"at": stamp(NOW), "segment": f"{1:024X}", "stanza": OURS.name}
    assert archive.push(here, history, second, 2048, NOW + timedelta(seconds=2)) == ""
    assert tried == [first, first], "the next segment is skipped without an attempt"
    assert archive.push(here, history, third, 2048, NOW + timedelta(seconds=70)) == ""
    assert tried == [first, first, third]
    assert history.read("archive") == {}
    monkeypatch.setattr(archive, "push_once", lambda *given: "")
    assert archive.push(here, history, third, 4096, NOW + timedelta(seconds=80)) == ""
    assert history.read("archive")["segment"] == f"{3:024X}"


PGBACKREST = """#!/bin/sh
echo "$*" >>calls
case " $* " in
*" stanza-create "*)
  [ -e locked ] && rm locked && echo "ERROR: [050]: unable to acquire lock on file 'archive.lock'" && exit 50
  touch made ;;
*" info "*)
  echo '[{"backup": [{"label": "20261122-141500F", "type": "full", "info": {"size": 1048576}}]}]' ;;
*" backup "*)
  [ -e made ] && exit 0
  echo "ERROR: [055]: unable to load info file"
  echo "HINT: has a stanza-create been performed?"
  exit 55 ;;
esac
"""
"""A stand-in for pgBackRest. stanza-create fails while the stanza is locked, as on a server with constant archiving."""


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        (["made"], ["backup"]),
        ([], ["backup", "create", "backup"]),
        (["locked"], ["backup", "create", "create", "backup"]),
    ],
)
def test_base_backup_creates_a_missing_stanza_and_retries_while_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], asked: list[str]
) -> None:
    (tmp_path / "programs").mkdir()
    program = tmp_path / "programs" / "pgbackrest"
    program.write_text(PGBACKREST.replace(">>calls", f">>{tmp_path}/calls"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / pgbackrest.STANZA_FILE).write_text(f"{OURS.name}\n")
    for name in there:
        (tmp_path / name).touch()
    (tmp_path / "history").mkdir()
    took = base_backup.take(
        Repository(tmp_path), LastRuns(tmp_path / "history"), 30 * DAY, NOW, lambda: False, at_once=False
    )
    assert took == "base backup 20261122-141500F of 1 MiB"
    calls = [line.split()[-1].removeprefix("stanza-") for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[: len(asked)] == asked and len(calls) == len(asked) + 1


# Restore requests


def line(began: datetime, *ends: datetime, until: datetime, major: int = 15, empty: bool = False) -> StanzaRange:
    bases = tuple(BaseBackup(f"{end:%Y%m%d-%H%M%S}F", end, 1 << 20, empty) for end in ends)
    return StanzaRange(Stanza(major, OURS.system, began), bases, until)


DAY = timedelta(days=1)
FIRST = line(OURS.began, OURS.began + DAY, OURS.began + 2 * DAY, until=OURS.began + 3 * DAY)
SECOND = line(OURS.began + 2.5 * DAY, OURS.began + 4 * DAY, until=OURS.began + 5 * DAY)
DUMPS = (Dump("dumps/a.dump", OURS.began + DAY, 1), Dump("dumps/b.dump", OURS.began + 5 * DAY, 1))
THERE = RecoveryPoints((FIRST, SECOND), DUMPS)


def chosen(value: str, there: RecoveryPoints = THERE, major: int = 15, ours: Stanza | None = None) -> RecoveryPoint:
    return restore_choice.choose(value, there, major, ours, NOW)


def test_latest_is_the_end_of_the_newest_stanza() -> None:
    found = chosen("latest")
    assert (found.line, found.base, found.whole) == (SECOND, SECOND.bases[-1], True)


def test_latest_ignores_the_stanza_of_a_new_empty_volume() -> None:
    newborn = line(NOW - DAY, NOW - DAY, until=NOW, empty=True)
    assert chosen("latest", RecoveryPoints((FIRST, newborn))).line == FIRST
    assert chosen("latest", RecoveryPoints((newborn,))).line == newborn


def test_latest_for_another_major_is_the_newest_dump() -> None:
    assert chosen("latest", major=17).dump == DUMPS[-1]
    assert chosen("latest", RecoveryPoints((FIRST,), DUMPS)).dump == DUMPS[-1], "a dump days newer is the latest"
    with pytest.raises(BackupError, match="nothing to restore in the backups bucket; available: no backup"):
        chosen("latest", RecoveryPoints())


def test_point_in_time_is_restored_from_the_stanza_in_service_then() -> None:
    found = chosen(stamp(OURS.began + 2.2 * DAY))
    assert (found.line, found.base) == (FIRST, FIRST.bases[1])
    assert found.target == OURS.began + 2.2 * DAY
    assert chosen(stamp(OURS.began + 1.5 * DAY)).base == FIRST.bases[0]
    assert chosen(stamp(OURS.began + 4.5 * DAY)).line == SECOND
    assert chosen(stamp(NOW), ours=SECOND.stanza).line == SECOND, "the stanza in service covers the time until now"


@pytest.mark.parametrize("moment", [OURS.began, OURS.began + 6 * DAY, NOW + DAY])
def test_uncovered_point_in_time_is_refused_with_the_available_backups(moment: datetime) -> None:
    with pytest.raises(BackupError) as refused:
        chosen(stamp(moment))
    assert f"no backup covers {stamp(moment)}; available: any moment from 2026-11-02T08:00:00Z" in str(refused.value)
    assert "dumps dumps/a.dump, dumps/b.dump" in str(refused.value)


def test_backups_are_found_by_name() -> None:
    label = FIRST.bases[0].label
    assert (chosen(label).line, chosen(label).base, chosen(label).whole) == (FIRST, FIRST.bases[0], False)
    for name in ("a.dump", "dumps/a.dump", "s3://bbb/dumps/a.dump"):
        assert chosen(name).dump == DUMPS[0]


@pytest.mark.parametrize("name", ["20200101-000000F", "dumps/none.dump", "yesterday", "main; rm"])
def test_unknown_name_is_refused_with_the_available_backups(name: str) -> None:
    with pytest.raises(BackupError, match="; available: any moment from") as refused:
        chosen(name)
    assert "\n" not in str(refused.value)


def test_inventory_lists_the_newest_names_once_and_their_number() -> None:
    """The test uses a month of nightly dumps, and a store that lists each key twice."""
    nights = [f"dumps/202611{day:02}T013300Z-nightly-f4a9b2c7d1e6.dump" for day in range(1, 31)]
    contents = [{"Key": key, "LastModified": NOW, "Size": 1} for key in nights]

    class Store:
        def get_paginator(self, operation: str) -> Any:
            return self

        def paginate(self, **_: str) -> list[dict[str, Any]]:
            return [{"Contents": contents}, {"Contents": contents}]

    there = restore_choice.list_recovery_points(None, Store(), "b")
    assert [found.key for found in there.dumps] == nights
    weeks = tuple(dataclasses.replace(FIRST.bases[0], label=f"202611{day:02}-010000F") for day in range(1, 29))
    histories = tuple(dataclasses.replace(FIRST, bases=weeks) for _ in range(9))
    told = restore_choice.inventory(RecoveryPoints(histories, there.dumps))
    assert told.endswith(f" and dumps {', '.join(nights[-3:])} (the newest 3 of 30)")
    assert all(told.count(name) == 1 for name in nights[-3:])
    assert len(told) < 900


def test_prefix_of_base_backups_is_that_of_pgbackrest() -> None:
    assert f"{pgbackrest.FOLDER}/backup/" == restore_request.BASE_BACKUPS
    assert restore_request.is_label("20261122-013005F_20261123-010000I")
    assert not restore_request.is_label("backup.history")
    assert restore_request.made("20261122-013005F_20261123-010000D") == datetime(2026, 11, 23, 1, tzinfo=UTC)


@pytest.mark.parametrize("value", ["20261101-000000F", DUMPS[0].key, "latest", "2026-11-20T00:00:00Z", "2999-01-01"])
def test_stack_accepts_every_request_that_the_machine_can_restore(value: str) -> None:
    """The stack checks only names. The stack may accept a request that the machine refuses, but must not refuse a
    request that the machine accepts."""
    labels = [base.label for line in THERE.lines for base in line.bases]
    refused = restore_request.missing(value, [dump.key for dump in DUMPS], labels, NOW)
    try:
        chosen(value)
    except BackupError:
        return
    assert refused is None


def test_base_backup_of_another_major_is_refused() -> None:
    with pytest.raises(BackupError, match="is from PostgreSQL 15, which PostgreSQL 17 of this image cannot read"):
        chosen(FIRST.bases[0].label, major=17)


@pytest.mark.parametrize("value", ["2026-11-22T14:15:00Z", "2026-11-22 14:15", "2026-11-22T15:15:00+01:00"])
def test_point_in_time_without_offset_is_utc(value: str) -> None:
    assert restore_request.parse(value).time == NOW


def test_stanza_range_is_read_from_pgbackrest_info() -> None:
    entry = {
        "name": OURS.name,
        "archive": [{"id": "15-1", "min": "000000010000000000000001", "max": "0000000100000000000000AB"}],
        "backup": [
            {"label": "20261102-080000F", "timestamp": {"stop": 1793606400}, "info": {"size": 5}, "error": False},
            {"label": "20261103-080000F", "timestamp": {"stop": 1793692800}, "info": {"size": 5}, "error": True},
        ],
    }

    class Store:
        """Stands in for boto3's client."""

        def list_objects_v2(self, Bucket: str, Prefix: str) -> dict[str, Any]:
            assert Bucket == "bbb"
            folder = f"pgbackrest/archive/{OURS.name}/15-1/0000000100000000"
            assert Prefix == f"{folder}/0000000100000000000000AB"
            return {"Contents": [{"LastModified": NOW}]}

    found = restore_choice.stanza_range(entry, Store(), "bbb")
    assert found is not None
    assert [each.label for each in found.bases] == ["20261102-080000F"], "a backup with errors is ignored"
    assert found.until == NOW
    assert restore_choice.stanza_range({**entry, "backup": []}, Store(), "bbb") is None


# Interrupted restores


def place(folder: Path) -> restore.RestorePaths:
    for name in ("postgresql", "backups"):
        (folder / name).mkdir()
    return restore.RestorePaths(
        clusters=folder / "postgresql",
        major=15,
        programs=folder,
        sockets=folder,
        settings=folder,
        repository_settings=folder,
        history=LastRuns(folder / "backups"),
    )


def cluster(folder: Path, began: datetime) -> Stanza:
    (folder / "global").mkdir(parents=True)
    (folder / "global/pg_control").write_bytes(struct.pack("=Q", OURS.system) + bytes(8184))
    (folder / "PG_VERSION").write_text("15\n")
    return pgbackrest.start_stanza(folder, began)


@pytest.mark.parametrize("crash", ["before the exchange", "after the exchange", "after the rename", "at the end"])
def test_recorded_exchange_is_finished_after_a_crash_at_any_point(tmp_path: Path, crash: str) -> None:
    here = place(tmp_path)
    old, new = cluster(here.live, OURS.began), cluster(here.work, NOW)
    kept = here.clusters / "15.kept-20261122T141500Z"
    here.history.write(restore.FLIP, {"history": new.name, "kept": kept.name, "note": {"value": "x", "what": "w"}})
    here.history.write(restore.REQUEST, {"value": "latest"})
    if crash != "before the exchange":
        restore.exchange(here.work, here.live)
    if crash in ("after the rename", "at the end"):
        here.work.rename(kept)
    if crash == "at the end":
        here.history.write(restore.RESTORED, {"value": "x", "what": "w"})

    assert restore.finish_exchange(here) == "w"
    assert pgbackrest.stanza_of(here.live) == new
    assert pgbackrest.stanza_of(kept) == old
    assert sorted(path.name for path in here.clusters.iterdir()) == ["15", kept.name]
    assert [path.name for path in here.history.folder.iterdir()] == ["restored.json"]
    assert restore.finish_exchange(here) is None


def test_restore_to_an_empty_volume_keeps_nothing_aside(tmp_path: Path) -> None:
    here = place(tmp_path)
    new = cluster(here.work, NOW)
    here.history.write(restore.FLIP, {"history": new.name, "kept": None, "note": {"value": "latest", "what": "w"}})
    assert restore.finish_exchange(here) == "w"
    assert pgbackrest.stanza_of(here.live) == new
    assert [path.name for path in here.clusters.iterdir()] == ["15"]


def test_cluster_of_another_major_is_set_aside_after_the_restore(tmp_path: Path) -> None:
    """If the old cluster kept its name, an image with the old PostgreSQL major would start this cluster, whose data is
    outdated."""
    here = place(tmp_path)
    old, new = cluster(here.clusters / "13", OURS.began), cluster(here.work, NOW)
    here.history.write(restore.FLIP, {"history": new.name, "kept": None, "note": {"value": "latest", "what": "w"}})
    assert restore.finish_exchange(here) == "w"
    aside = here.history.read(restore.RESTORED)["kept"]
    assert aside.startswith("13.kept-")
    assert pgbackrest.stanza_of(here.clusters / aside) == old
    assert sorted(path.name for path in here.clusters.iterdir()) == [aside, "15"]


def test_leftovers_of_an_interrupted_restore_are_removed_when_it_is_no_longer_requested(tmp_path: Path) -> None:
    here = place(tmp_path)
    live = cluster(here.live, OURS.began)
    cluster(here.work, NOW)
    (tmp_path / "status").mkdir()
    with step("restore", tmp_path) as s:
        assert restore.perform(here, document(), s) == "no restore is requested, or it is done already"
    assert [path.name for path in here.clusters.iterdir()] == ["15"]
    assert pgbackrest.stanza_of(here.live) == live


@pytest.mark.parametrize(("state", "down"), [("running", False), ("degraded", False), ("stopping", True), ("", True)])
def test_shutdown_is_detected_from_systemctl(
    state: str, down: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If systemd cancels the restore because of a shutdown, the restore did not fail, so the command keeps the request
    for the next boot."""
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\necho {state}\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert restore.going_down() is down


def test_gap_in_the_log_is_distinguished_from_its_end() -> None:
    whole = StanzaRange(OURS, FIRST.bases, FIRST.until, f"{7:024X}")
    asked = RecoveryPoint(whole, whole.bases[0], NOW)
    restored = [f'LOG:  restored log file "{number:024X}" from archive' for number in range(8)]
    assert restore.gap_in(asked, restored) == ""
    assert restore.gap_in(asked, restored[:-1]) == f"the archived write-ahead log has a gap after {6:024X}"
    assert restore.gap_in(asked, []) == "the archived write-ahead log has a gap at its beginning"


def test_restore_request_of_the_stack_is_performed_once(tmp_path: Path) -> None:
    history = LastRuns(tmp_path)
    assert restore.state_of(history, "") == restore.RestoreState.NOTHING_TO_DO
    assert restore.state_of(history, "latest") == restore.RestoreState.REQUESTED_BY_STACK
    history.write(restore.RESTORED, {"value": "latest", "at": stamp(NOW)})
    assert restore.state_of(history, "latest") == restore.RestoreState.NOTHING_TO_DO
    assert restore.state_of(history, "20261102-080000F") == restore.RestoreState.REQUESTED_BY_STACK
    assert json.loads((tmp_path / "restored.json").read_text())["value"] == "latest"


def test_decided_exchange_precedes_requests_and_a_request_by_hand_precedes_the_stacks(tmp_path: Path) -> None:
    history = LastRuns(tmp_path)
    history.write(restore.REQUEST, {"value": "latest"})
    assert restore.state_of(history, "20261102-080000F") == restore.RestoreState.REQUESTED_BY_HAND
    history.write(restore.FLIP, {"history": "x", "kept": None, "note": {}})
    assert restore.state_of(history, "20261102-080000F") == restore.RestoreState.EXCHANGE_DECIDED
    history.forget(restore.FLIP)
    history.forget(restore.REQUEST)
    assert restore.state_of(history, "") == restore.RestoreState.NOTHING_TO_DO


@pytest.mark.long
def test_only_status_1_of_archive_get_ends_recovery(tmp_path: Path) -> None:
    """If restore_command exits with a status up to 125, PostgreSQL ends recovery. With 126, PostgreSQL fails."""
    expected = {0: 0, 1: 1, 25: 126, 82: 126, 103: 126}
    running = {}
    for status in expected:
        script = tmp_path / f"fetch-{status}"
        script.write_text(f"#!/bin/sh\nexit {status}\n")
        script.chmod(0o755)
        shell = restore.FETCH.format(fetch=script).replace("%f", "F").replace("%p", "P")
        running[status] = subprocess.Popen(["sh", "-c", shell])
    assert {status: each.wait() for status, each in running.items()} == expected
