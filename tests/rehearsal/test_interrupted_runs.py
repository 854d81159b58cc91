"""After a run that fails, is interrupted or is killed, the next run continues from the saved state."""

from pathlib import Path

import pytest

from scripts.rehearsal import state
from scripts.rehearsal.engine import Engine
from scripts.rehearsal.errors import ApplyError, Interrupted, StateError
from scripts.rehearsal.state import Resource, State
from scripts.rehearsal.wire import Secret
from tests.support.recording_cloud import RecordingCloud, Thing, engine_of, opts, up


def three() -> None:
    one = Thing("one")
    two = Thing("two", on=one.address)
    Thing("three", on=two.address)


def replaced(fixed: str) -> None:
    base = Thing("base", fixed=fixed, opts=opts(delete_before_replace=True))
    Thing("user", on=base.address)


def test_run_after_a_failure_creates_only_the_missing_resources() -> None:
    cloud, current = RecordingCloud(failing={("create", "two")}), State()
    with pytest.raises(ApplyError, match="two: Create failed with Broken: no create today"):
        up(cloud, current, three)
    assert cloud.verbs() == ["create one", "create two"]
    cloud.failing.clear()
    up(cloud, current, three)
    assert cloud.verbs() == ["create two", "create three"]
    assert len(cloud.things) == 3


def test_failure_between_delete_and_create_is_completed_by_the_next_run() -> None:
    cloud, current = RecordingCloud(), State()
    up(cloud, current, lambda: replaced("a"))
    cloud.failing = {("create", "base")}
    with pytest.raises(ApplyError):
        up(cloud, current, lambda: replaced("b"))
    assert cloud.things == {}
    cloud.failing.clear()
    cloud.verbs()
    up(cloud, current, lambda: replaced("b"))
    assert cloud.verbs() == ["create base", "create user"]


def test_failed_deletion_of_a_replaced_resource_is_repeated() -> None:
    cloud, current = RecordingCloud(), State()
    up(cloud, current, lambda: Thing("one", fixed="a"))
    cloud.failing = {("delete", "one")}
    with pytest.raises(ApplyError):
        up(cloud, current, lambda: Thing("one", fixed="b"))
    assert len(cloud.things) == 2
    cloud.failing.clear()
    cloud.verbs()
    up(cloud, current, lambda: Thing("one", fixed="b"))
    assert cloud.verbs() == ["delete one"]
    assert [each["fixed"] for each in cloud.things.values()] == ["b"]


def test_interrupt_waits_for_the_current_operation() -> None:
    cloud, current = RecordingCloud(), State()
    engines: list[Engine] = []

    def interrupt(verb: str, name: str) -> None:
        if name == "two":
            engines[0].cancel()

    cloud.on_call = interrupt
    engines.append(engine_of(cloud, current))
    from scripts.rehearsal import program_runner

    with pytest.raises(Interrupted):
        program_runner.run(
            three,
            engines[0],
            {},
            project="test",
            stack_name="dev",
            config={},
            secret_keys=[],
            on_log=lambda text: None,
        )
    assert cloud.verbs() == ["create one", "create two"]
    assert [each.name for each in current.resources if each.custom] == ["one", "two"]
    up(cloud, current, three)
    assert cloud.verbs() == ["create three"]


class Killed(BaseException):
    """An exception that stands in for SIGKILL. The engine runs no code after `Killed` is raised."""


def test_creation_killed_after_its_call_is_adopted(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    cloud = RecordingCloud()
    engine = engine_of(cloud, State())
    engine.save = lambda now: state.save(path, now)
    thing = Resource(
        urn="urn:pulumi:dev::test::pulumi:pulumi:Stack$test:index:Thing::one",
        type="test:index:Thing",
        id="",
        inputs={"name": "one", "label": "one-made-up"},
        generated=["label"],
    )
    engine._begin("create", thing)
    cloud.create(engine.aws, thing.inputs)  # the process is killed here
    cloud.verbs()

    (told,) = engine_of(cloud, state.load(path)).recover()
    assert "one-1 exists and is adopted (Pulumi would require `pulumi import`)" in told
    up(cloud, state.load(path), lambda: Thing("one"))
    assert cloud.verbs() == []
    assert len(cloud.things) == 1


def test_creation_killed_before_its_call_is_reported_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    cloud = RecordingCloud()
    engine = engine_of(cloud, State())
    engine.save = lambda now: state.save(path, now)
    urn = "urn:pulumi:dev::test::pulumi:pulumi:Stack$test:index:Thing::one"
    engine._begin("create", Resource(urn, "test:index:Thing", "", {"name": "one", "label": "x"}))
    (leftover,) = engine_of(cloud, state.load(path)).recover()
    assert "one" in leftover
    up(cloud, state.load(path), lambda: Thing("one"))
    assert cloud.verbs() == ["create one"]


def test_the_state_is_saved_around_every_operation() -> None:
    cloud, current = RecordingCloud(), State()
    seen: list[int] = []
    cloud.on_call = lambda verb, name: seen.append(len(cloud.saves))
    up(cloud, current, three)
    assert seen[0] >= 1
    assert seen == sorted(set(seen))


def test_saved_state_is_private_and_encrypts_secrets(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    written = State(
        resources=[Resource("urn:a", "t", "1", inputs={"a": {"b": [Secret("hush"), 1]}}, protect=True)],
        settings={"adminPassword": Secret("hush hush")},
        outputs={"url": "http://x"},
    )
    state.save(path, written)
    assert state.load(path) == written
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.with_suffix(".key").stat().st_mode & 0o777 == 0o600
    assert "hush" not in path.read_text()
    assert [each.name for each in tmp_path.iterdir() if "new" in each.name] == []


def test_invalid_state_file_is_one_error_sentence(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("{")
    with pytest.raises(StateError, match="down --purge"):
        state.load(path)
    path.write_text('{"format": 99}')
    with pytest.raises(StateError, match="format 99"):
        state.load(path)
    assert state.load(tmp_path / "none.json") == State()
