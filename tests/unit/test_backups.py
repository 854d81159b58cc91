"""Backups without a machine: what is rendered, when something is due, what a name means, how a restore is finished."""

from __future__ import annotations

import configparser
import json
import struct
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow_host import config, launch, sizing, web
from mlflow_host.backups import archive, base, check, dump, listing, naming, repository, restore
from mlflow_host.backups.check import Waiting
from mlflow_host.backups.history import History, is_due, stamp
from mlflow_host.backups.listing import Available, Base, Dump, Line
from mlflow_host.backups.repository import BackupError, Repository, Stanza
from mlflow_host.status import step

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
    monkeypatch.setattr(web, "TEMPLATES", ROOTFS / "usr/share/mlflow-host/templates")
    host = config.host_config(document(**backups), sizing.size(sizing.Machine(2048, 2)))
    parser = configparser.ConfigParser()
    parser.read_string(repository.settings(host))
    return parser


# What is rendered


def test_pgbackrest_is_sent_to_aws_with_the_role(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rendered(monkeypatch, retention_days=7)["global"]
    assert found["repo1-s3-endpoint"] == "s3.eu-central-1.amazonaws.com"
    assert (found["repo1-s3-bucket"], found["repo1-s3-region"]) == ("bbb", "eu-central-1")
    assert found["repo1-s3-key-type"] == "auto"
    assert (found["repo1-retention-full"], found["repo1-retention-full-type"]) == ("7", "time")
    assert not [key for key in found if "secret" in key or "path-style" in key or "ca-file" in key or "port" in key]


def test_pgbackrest_is_sent_to_another_store_with_its_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rendered(monkeypatch, endpoint="https://store.internal:9000", authority=AUTHORITY)["global"]
    assert (found["repo1-s3-endpoint"], found["repo1-storage-port"]) == ("store.internal", "9000")
    assert found["repo1-s3-uri-style"] == "path"
    assert found["repo1-storage-ca-file"] == str(repository.AUTHORITY)


def test_a_store_by_plain_http_is_none_for_pgbackrest() -> None:
    assert repository.archives(document())
    assert repository.archives(document(endpoint="https://store"))
    assert not repository.archives(document(endpoint="http://store"))


def test_an_authority_needs_an_address() -> None:
    with pytest.raises(launch.LaunchError, match=r"backups\.authority is set but backups\.endpoint is no https"):
        document(authority=AUTHORITY)


# Histories


def test_a_cluster_is_given_a_history_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "global").mkdir()
    (tmp_path / "global/pg_control").write_bytes(struct.pack("=Q", OURS.system) + bytes(8184))
    (tmp_path / "PG_VERSION").write_text("15\n")
    assert repository.stanza_of(tmp_path) is None
    assert repository.begin_history(tmp_path, OURS.began) == OURS == repository.stanza_of(tmp_path)
    assert OURS.name == "pg15-7711001897250578601-20261101T080000Z"
    assert repository.parse_stanza("main") is None


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
def test_what_is_nightly_is_done_by_night_or_when_a_night_was_missed(
    hours: int | None, now: datetime, due: bool
) -> None:
    assert is_due(now - timedelta(hours=hours) if hours is not None else None, now) is due


def backed_up(folder: Path, *, ago: timedelta, full_ago: timedelta, stanza: Stanza = OURS) -> History:
    history = History(folder)
    content = {"stanza": stanza.name, "at": stamp(NOW - ago), "full_at": stamp(NOW - full_ago)}
    history.write("base", content)
    return history


def test_the_first_base_backup_of_a_history_is_full(tmp_path: Path) -> None:
    month = timedelta(days=30)
    assert base.wanted(History(tmp_path), OURS, month, NOW) == "full"
    history = backed_up(tmp_path, ago=timedelta(hours=1), full_ago=timedelta(hours=1))
    assert base.wanted(history, OURS, month, NOW) is None
    restored = Stanza(OURS.major, OURS.system, NOW)
    assert base.wanted(history, restored, month, NOW) == "full"


def test_base_backups_are_full_once_a_week_and_after_a_gap(tmp_path: Path) -> None:
    month, day = timedelta(days=30), timedelta(days=1)
    history = backed_up(tmp_path, ago=timedelta(hours=27), full_ago=3 * day)
    assert base.wanted(history, OURS, month, NOW) == "diff"
    assert base.wanted(history, OURS, 2 * day, NOW) == "full", "a shorter retention asks for full ones more often"
    history = backed_up(tmp_path, ago=timedelta(hours=27), full_ago=8 * day)
    assert base.wanted(history, OURS, month, NOW) == "full"
    history = backed_up(tmp_path, ago=timedelta(hours=1), full_ago=day)
    history.write("gap", {"at": stamp(NOW - timedelta(minutes=5)), "stanza": OURS.name})
    assert base.wanted(history, OURS, month, NOW) == "full"


def test_outdated_dumps_go_but_never_the_newest() -> None:
    ages = [50, 40, 31, 30, 1]
    found = [(NOW - timedelta(days=days), f"dumps/{days}.dump") for days in ages]
    assert dump.beyond(found, timedelta(days=30), NOW) == ["dumps/50.dump", "dumps/40.dump", "dumps/31.dump"]
    assert dump.beyond(found[:1], timedelta(days=30), NOW) == []
    assert dump.beyond([], timedelta(days=30), NOW) == []


# What is wrong


def good(folder: Path) -> History:
    history = backed_up(folder, ago=timedelta(hours=20), full_ago=timedelta(hours=20))
    history.write("dump", {"at": stamp(NOW - timedelta(hours=20))})
    history.write("archive", {"at": stamp(NOW - timedelta(days=3)), "segment": "0" * 24})
    return history


NONE = Waiting()


def problems(history: History, queue: Waiting = NONE, *, archiving: bool = True) -> list[str]:
    found = check.summary(history, OURS, queue, NOW, archiving)
    assert found["state"] == ("late" if found["problems"] else "good")
    return list(found["problems"])


def test_nothing_is_wrong_while_all_is_young_and_nothing_waits(tmp_path: Path) -> None:
    """A database that nobody writes to has nothing to archive, for as long as that is so."""
    assert problems(good(tmp_path)) == []
    assert problems(good(tmp_path), Waiting(1, NOW - timedelta(minutes=9))) == []


def test_a_machine_that_has_just_booted_tells_what_there_is_and_that_nothing_is_late(tmp_path: Path) -> None:
    old = good(tmp_path)
    old.write("dump", {"at": stamp(NOW - timedelta(days=9))})
    found = check.summary(old, OURS, Waiting(3, NOW - timedelta(days=9)), NOW, True, just_booted=True)
    assert (found["state"], found["problems"], found["segments_waiting"]) == ("good", [], 3)
    assert found["dump"] == {"at": stamp(NOW - timedelta(days=9))}


def test_each_thing_that_is_late_is_a_sentence(tmp_path: Path) -> None:
    (late,) = problems(good(tmp_path), Waiting(3, NOW - timedelta(minutes=50)))
    assert late.startswith("3 segments of the write-ahead log wait to be archived, for up to 50 minutes")
    good(tmp_path).write("dump", {"at": stamp(NOW - timedelta(hours=37))})
    (late,) = problems(History(tmp_path))
    assert late.startswith(
        "the last dump is 37 hours old, of 2026-11-21T01:15:00Z: see `journalctl -u mlflow-host-dump`"
    )
    (tmp_path / "dump.json").unlink()
    (late,) = problems(History(tmp_path))
    assert late.startswith("there is no dump yet")
    backed_up(tmp_path, ago=timedelta(hours=37), full_ago=timedelta(hours=37))
    assert [each.split(" is ")[0] for each in problems(History(tmp_path))] == ["there", "the last base backup"]


def test_a_gap_is_told_until_the_next_base_backup(tmp_path: Path) -> None:
    history = good(tmp_path)
    history.write("gap", {"at": stamp(NOW - timedelta(hours=1)), "stanza": OURS.name})
    (late,) = problems(history)
    assert "the archived write-ahead log has a gap at 2026-11-22T13:15:00Z" in late
    backed_up(tmp_path, ago=timedelta(minutes=1), full_ago=timedelta(minutes=1))
    assert problems(history) == []


def test_a_store_by_plain_http_is_told(tmp_path: Path) -> None:
    (told,) = problems(good(tmp_path), archiving=False)
    assert "set backupsEndpoint to an https:// address" in told


# The way from PostgreSQL to the archive


def test_postgresql_hears_what_became_of_its_segment(tmp_path: Path) -> None:
    """The command as PostgreSQL runs it, against the socket as the service opens it."""
    path = tmp_path / "s"
    program = (ROOTFS / "usr/lib/mlflow-host/mlflow_host/backups/ask_pgbackrest.py").read_text()
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
    assert absent.returncode == 1 and "the archiving service does not answer" in absent.stderr


@pytest.mark.parametrize("segment", ["", "../../etc/passwd", "pg_wal/../../x", "base/1"])
def test_nothing_but_segments_is_archived(tmp_path: Path, segment: str) -> None:
    assert "is no segment" in archive.push(Repository(tmp_path), History(tmp_path), segment, 1)


def waits(cluster: Path, segments: int) -> None:
    """Finished segments of 1 KiB, as PostgreSQL leaves them for the archive."""
    (cluster / "pg_wal/archive_status").mkdir(parents=True)
    (cluster / repository.STANZA_FILE).write_text(f"{OURS.name}\n")
    for number in range(1, segments + 1):
        (cluster / f"pg_wal/{number:024X}").write_bytes(bytes(1024))
        (cluster / f"pg_wal/archive_status/{number:024X}.ready").touch()
    (cluster / f"pg_wal/archive_status/{1:024X}.backup.done").touch()


def test_a_dead_bucket_never_fills_the_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments wait up to a limit; beyond it they are given up, which is noted, and tried again once a minute."""
    tried: list[str] = []

    def dead(where: Repository, stanza: Stanza, segment: str) -> str:
        tried.append(segment)
        return "the bucket is out of reach"

    monkeypatch.setattr(archive, "pushed", dead)
    waits(tmp_path, 3)
    (tmp_path / "history").mkdir()
    here, history = Repository(tmp_path), History(tmp_path / "history")
    assert archive.waiting_bytes(tmp_path) == 3072
    first, second, third = (f"pg_wal/{number:024X}" for number in (1, 2, 3))
    assert archive.push(here, history, first, 4096, NOW) == "the bucket is out of reach"
    assert history.read("gap") == {}, "there is room for more to wait"
    assert archive.push(here, history, first, 2048, NOW) == ""
    assert history.read("gap") == {"at": stamp(NOW), "segment": f"{1:024X}", "stanza": OURS.name}
    assert archive.push(here, history, second, 2048, NOW + timedelta(seconds=2)) == ""
    assert tried == [first, first], "the next ones are not waited for"
    assert archive.push(here, history, third, 2048, NOW + timedelta(seconds=70)) == ""
    assert tried == [first, first, third]
    assert history.read("archive") == {}
    monkeypatch.setattr(archive, "pushed", lambda *given: "")
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
"""As pgBackRest answers; stanza-create is refused while the log is being archived, which on a busy server is mostly."""


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        (["made"], ["backup"]),
        ([], ["backup", "create", "backup"]),
        (["locked"], ["backup", "create", "create", "backup"]),
    ],
)
def test_a_base_backup_waits_for_no_lock_and_makes_the_stanza_only_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], asked: list[str]
) -> None:
    (tmp_path / "programs").mkdir()
    program = tmp_path / "programs" / "pgbackrest"
    program.write_text(PGBACKREST.replace(">>calls", f">>{tmp_path}/calls"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / repository.STANZA_FILE).write_text(f"{OURS.name}\n")
    for name in there:
        (tmp_path / name).touch()
    (tmp_path / "history").mkdir()
    took = base.take(Repository(tmp_path), History(tmp_path / "history"), 30 * DAY, NOW, lambda: False, at_once=False)
    assert took == "base backup 20261122-141500F of 1 MiB"
    calls = [line.split()[-1].removeprefix("stanza-") for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[: len(asked)] == asked and len(calls) == len(asked) + 1


# What a name means


def line(began: datetime, *ends: datetime, until: datetime, major: int = 15, empty: bool = False) -> Line:
    bases = tuple(Base(f"{end:%Y%m%d-%H%M%S}F", end, 1 << 20, empty) for end in ends)
    return Line(Stanza(major, OURS.system, began), bases, until)


DAY = timedelta(days=1)
FIRST = line(OURS.began, OURS.began + DAY, OURS.began + 2 * DAY, until=OURS.began + 3 * DAY)
SECOND = line(OURS.began + 2.5 * DAY, OURS.began + 4 * DAY, until=OURS.began + 5 * DAY)
DUMPS = (Dump("dumps/a.dump", OURS.began + DAY, 1), Dump("dumps/b.dump", OURS.began + 5 * DAY, 1))
THERE = Available((FIRST, SECOND), DUMPS)


def chosen(value: str, there: Available = THERE, major: int = 15, ours: Stanza | None = None) -> listing.Chosen:
    return listing.choose(value, there, major, ours, NOW)


def test_latest_is_the_end_of_the_newest_history() -> None:
    found = chosen("latest")
    assert (found.line, found.base, found.whole) == (SECOND, SECOND.bases[-1], True)


def test_latest_is_not_what_a_new_and_empty_volume_has_begun_meanwhile() -> None:
    newborn = line(NOW - DAY, NOW - DAY, until=NOW, empty=True)
    assert chosen("latest", Available((FIRST, newborn))).line == FIRST
    assert chosen("latest", Available((newborn,))).line == newborn


def test_latest_for_another_major_is_the_newest_dump() -> None:
    assert chosen("latest", major=17).dump == DUMPS[-1]
    assert chosen("latest", Available((FIRST,), DUMPS)).dump == DUMPS[-1], "a dump that is days younger is the latest"
    with pytest.raises(BackupError, match="nothing to restore in the backups bucket: there is no backup at all"):
        chosen("latest", Available())


def test_a_moment_is_had_from_the_history_that_was_in_service_then() -> None:
    found = chosen(stamp(OURS.began + 2.2 * DAY))
    assert (found.line, found.base) == (FIRST, FIRST.bases[1])
    assert found.target == OURS.began + 2.2 * DAY
    assert chosen(stamp(OURS.began + 1.5 * DAY)).base == FIRST.bases[0]
    assert chosen(stamp(OURS.began + 4.5 * DAY)).line == SECOND
    assert chosen(stamp(NOW), ours=SECOND.stanza).line == SECOND, "the history in service reaches until now"


@pytest.mark.parametrize("moment", [OURS.began, OURS.began + 6 * DAY, NOW + DAY])
def test_a_moment_that_nothing_reaches_is_refused_with_what_there_is(moment: datetime) -> None:
    with pytest.raises(BackupError) as refused:
        chosen(stamp(moment))
    assert f"nothing that is kept reaches {stamp(moment)}; there is any moment from 2026-11-02T08:00:00Z" in str(
        refused.value
    )
    assert "dumps dumps/a.dump, dumps/b.dump" in str(refused.value)


def test_backups_are_had_by_name() -> None:
    label = FIRST.bases[0].label
    assert (chosen(label).line, chosen(label).base, chosen(label).whole) == (FIRST, FIRST.bases[0], False)
    for name in ("a.dump", "dumps/a.dump", "s3://bbb/dumps/a.dump"):
        assert chosen(name).dump == DUMPS[0]


@pytest.mark.parametrize("name", ["20200101-000000F", "dumps/none.dump", "yesterday", "main; rm"])
def test_a_name_that_is_not_there_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(BackupError, match="; there is any moment from") as refused:
        chosen(name)
    assert "\n" not in str(refused.value)


def test_a_base_backup_of_another_major_is_refused() -> None:
    with pytest.raises(BackupError, match="is of PostgreSQL 15, which PostgreSQL 17 of this image cannot read"):
        chosen(FIRST.bases[0].label, major=17)


@pytest.mark.parametrize("value", ["2026-11-22T14:15:00Z", "2026-11-22 14:15", "2026-11-22T15:15:00+01:00"])
def test_a_point_in_time_is_utc_unless_it_says_otherwise(value: str) -> None:
    assert naming.parse(value).time == NOW


def test_a_stanza_is_read_as_pgbackrest_tells() -> None:
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

    found = listing.read_line(entry, Store(), "bbb")
    assert found is not None
    assert [each.label for each in found.bases] == ["20261102-080000F"], "not what pgBackRest found damaged"
    assert found.until == NOW
    assert listing.read_line({**entry, "backup": []}, Store(), "bbb") is None


# A restore that was interrupted


def place(folder: Path) -> restore.Place:
    for name in ("postgresql", "backups"):
        (folder / name).mkdir()
    return restore.Place(
        clusters=folder / "postgresql",
        major=15,
        programs=folder,
        sockets=folder,
        settings=folder,
        repository_settings=folder,
        history=History(folder / "backups"),
    )


def cluster(folder: Path, began: datetime) -> Stanza:
    (folder / "global").mkdir(parents=True)
    (folder / "global/pg_control").write_bytes(struct.pack("=Q", OURS.system) + bytes(8184))
    (folder / "PG_VERSION").write_text("15\n")
    return repository.begin_history(folder, began)


@pytest.mark.parametrize("crash", ["before the exchange", "after the exchange", "after the rename", "at the end"])
def test_an_exchange_that_was_decided_is_finished_from_any_point(tmp_path: Path, crash: str) -> None:
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

    assert restore.finish(here) == "w"
    assert repository.stanza_of(here.live) == new
    assert repository.stanza_of(kept) == old
    assert sorted(path.name for path in here.clusters.iterdir()) == ["15", kept.name]
    assert [path.name for path in here.history.folder.iterdir()] == ["restored.json"]
    assert restore.finish(here) is None


def test_on_an_empty_volume_there_is_nothing_to_exchange_with(tmp_path: Path) -> None:
    here = place(tmp_path)
    new = cluster(here.work, NOW)
    here.history.write(restore.FLIP, {"history": new.name, "kept": None, "note": {"value": "latest", "what": "w"}})
    assert restore.finish(here) == "w"
    assert repository.stanza_of(here.live) == new
    assert [path.name for path in here.clusters.iterdir()] == ["15"]


def test_the_cluster_of_another_major_is_kept_aside_once_data_has_moved(tmp_path: Path) -> None:
    """An image of that major would otherwise start it again, and with it the data of before the move."""
    here = place(tmp_path)
    old, new = cluster(here.clusters / "13", OURS.began), cluster(here.work, NOW)
    here.history.write(restore.FLIP, {"history": new.name, "kept": None, "note": {"value": "latest", "what": "w"}})
    assert restore.finish(here) == "w"
    aside = here.history.read(restore.RESTORED)["kept"]
    assert aside.startswith("13.kept-")
    assert repository.stanza_of(here.clusters / aside) == old
    assert sorted(path.name for path in here.clusters.iterdir()) == [aside, "15"]


def test_what_an_interrupted_restore_left_goes_when_nobody_asks_for_it_any_more(tmp_path: Path) -> None:
    here = place(tmp_path)
    live = cluster(here.live, OURS.began)
    cluster(here.work, NOW)
    (tmp_path / "status").mkdir()
    with step("restore", tmp_path) as s:
        assert restore.perform(here, document(), s).startswith("nothing is to be restored")
    assert [path.name for path in here.clusters.iterdir()] == ["15"]
    assert repository.stanza_of(here.live) == live


@pytest.mark.parametrize(("said", "down"), [("running", False), ("degraded", False), ("stopping", True), ("", True)])
def test_a_machine_that_goes_down_still_restores_what_was_asked_for(
    said: str, down: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd cancels the step then, which is no failure of it."""
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\necho {said}\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert restore.going_down() is down


def test_a_gap_in_the_log_is_not_taken_for_its_end() -> None:
    whole = Line(OURS, FIRST.bases, FIRST.until, f"{7:024X}")
    asked = listing.Chosen(whole, whole.bases[0], NOW)
    restored = [f'LOG:  restored log file "{number:024X}" from archive' for number in range(8)]
    assert restore.gap_in(asked, restored) == ""
    assert restore.gap_in(asked, restored[:-1]) == f"the archived write-ahead log has a gap after {6:024X}"
    assert restore.gap_in(asked, []) == "the archived write-ahead log has a gap at its beginning"


def test_what_the_stack_asks_for_is_restored_once(tmp_path: Path) -> None:
    history = History(tmp_path)
    assert restore.pending(history, "") == ""
    assert restore.pending(history, "latest") == "latest"
    history.write(restore.RESTORED, {"value": "latest", "at": stamp(NOW)})
    assert restore.pending(history, "latest") == ""
    assert restore.pending(history, "20261102-080000F") == "20261102-080000F"
    assert json.loads((tmp_path / "restored.json").read_text())["value"] == "latest"


def test_the_log_ends_where_the_archive_does_and_nowhere_else(tmp_path: Path) -> None:
    """PostgreSQL takes 126 for a failure, and up to 125 for the end of the log."""
    for status, expected in ((0, 0), (1, 1), (25, 126), (82, 126), (103, 126)):
        script = tmp_path / "fetch"
        script.write_text(f"#!/bin/sh\nexit {status}\n")
        script.chmod(0o755)
        shell = restore.FETCH.format(fetch=script).replace("%f", "F").replace("%p", "P")
        assert subprocess.run(["sh", "-c", shell]).returncode == expected
