"""The rehearsal's engine performs the same operations as Pulumi's engine, in the same order."""

import pulumi
import pytest

from scripts.rehearsal import program_runner
from scripts.rehearsal.errors import ApplyError
from scripts.rehearsal.state import State
from scripts.rehearsal.wire import Secret, reveal
from tests.support.recording_cloud import RecordingCloud, Thing, engine_of, opts, up


def chain(fixed: str, *, first: bool = False) -> None:
    """Replacing `base` replaces `user`, and replacing `user` replaces `reader`. `bystander` has only a depends_on."""
    base = Thing("base", fixed=fixed, opts=opts(delete_before_replace=True) if first else None)
    user = Thing("user", on=base.address)
    Thing("reader", on=user.address)
    Thing("bystander", size=1, opts=opts(depends_on=[base]))


def test_a_new_stack_is_created_in_dependency_order() -> None:
    cloud = RecordingCloud()
    up(cloud, State(), lambda: chain("a"))
    verbs = cloud.verbs()
    assert set(verbs) == {"create base", "create user", "create reader", "create bystander"}
    assert verbs.index("create base") < verbs.index("create user") < verbs.index("create reader")
    assert verbs.index("create base") < verbs.index("create bystander")


def test_the_same_program_again_changes_nothing() -> None:
    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: chain("a"))
    before = dict(cloud.things)
    cloud.verbs()
    engine = up(cloud, state, lambda: chain("a"))
    assert cloud.verbs() == []
    assert cloud.things == before
    assert engine.idle


def test_replacement_is_created_before_deletion_and_dependents_are_updated() -> None:
    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: chain("a"))
    cloud.verbs()
    up(cloud, state, lambda: chain("b"))
    verbs = cloud.verbs()
    assert verbs[0] == "create base"
    creations = [place for place, verb in enumerate(verbs) if verb.startswith("create")]
    deletions = [place for place, verb in enumerate(verbs) if verb.startswith("delete")]
    assert max(creations) < min(deletions)
    assert [verbs[place] for place in deletions] == ["delete reader", "delete user", "delete base"]
    assert len(cloud.things) == 4
    addresses = {f"at-{id_}" for id_ in cloud.things}
    assert all(each["on"] in addresses for each in cloud.things.values() if "on" in each)


def test_delete_before_replace_deletes_dependents_in_reverse_order() -> None:
    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: chain("a", first=True))
    cloud.verbs()
    up(cloud, state, lambda: chain("b", first=True))
    assert cloud.verbs() == [
        "delete reader",
        "delete user",
        "delete base",
        "create base",
        "create user",
        "create reader",
    ]


def test_resource_with_a_chosen_name_is_deleted_before_its_replacement() -> None:
    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: Thing("named", label="chosen", fixed="a"))
    cloud.verbs()
    up(cloud, state, lambda: Thing("named", label="chosen", fixed="b"))
    assert cloud.verbs() == ["delete named", "create named"]


def test_dependent_that_only_needs_an_update_is_not_deleted() -> None:
    def body(fixed: str) -> None:
        base = Thing("base", fixed=fixed, opts=opts(delete_before_replace=True))
        Thing("user", size=base.address)

    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: body("a"))
    cloud.verbs()
    up(cloud, state, lambda: body("b"))
    assert cloud.verbs() == ["delete base", "create base", "update user"]


def test_unregistered_resources_are_deleted_last_dependents_first() -> None:
    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: chain("a"))
    cloud.verbs()
    up(cloud, state, lambda: Thing("other"))
    verbs = cloud.verbs()
    assert verbs[0] == "create other"
    assert verbs.index("delete reader") < verbs.index("delete user") < verbs.index("delete base")
    assert verbs.index("delete bystander") < verbs.index("delete base")
    assert [each["name"] for each in cloud.things.values()] == ["other"]


@pytest.mark.parametrize("left", ["replaced", "removed", "taken along"])
def test_a_protected_resource_stops_the_run_before_anything_is_lost(left: str) -> None:
    def protected(fixed: str) -> None:
        base = Thing("base", fixed=fixed, opts=opts(protect=left != "taken along", delete_before_replace=True))
        Thing("user", on=base.address, opts=opts(protect=left == "taken along"))

    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: protected("a"))
    before = dict(cloud.things)
    with pytest.raises(ApplyError, match="protected"):
        up(cloud, state, (lambda: None) if left == "removed" else (lambda: protected("b")))
    assert cloud.things == before
    with pytest.raises(ApplyError, match="protected"):
        up(cloud, state, (lambda: None) if left == "removed" else (lambda: protected("b")), dry_run=True)


def test_a_retained_resource_leaves_the_state_and_stays_in_the_cloud() -> None:
    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: Thing("kept", opts=opts(retain_on_delete=True)))
    up(cloud, state, lambda: None)
    assert [each["name"] for each in cloud.things.values()] == ["kept"]
    assert [each for each in state.resources if each.custom] == []


def test_ignored_changes_are_not_applied_and_others_are() -> None:
    def body(size: int, colour: str) -> None:
        Thing("one", size=size, colour=colour, opts=opts(ignore_changes=["size"]))

    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: body(1, "red"))
    up(cloud, state, lambda: body(2, "red"))
    assert cloud.verbs() == ["create one"]
    up(cloud, state, lambda: body(3, "blue"))
    assert cloud.verbs() == ["update one"]
    (thing,) = cloud.things.values()
    assert (thing["size"], thing["colour"]) == (1, "blue")


def test_an_alias_keeps_a_renamed_resource() -> None:
    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: Thing("old", label="l"))
    cloud.verbs()

    class Renamed(pulumi.CustomResource):
        def __init__(self) -> None:
            props = {"name": "old", "label": "l"}
            super().__init__("test:index:Thing", "new", props, opts(aliases=[pulumi.Alias(name="old")]))

    up(cloud, state, lambda: Renamed())
    assert cloud.verbs() == []
    assert [each.name for each in state.resources if each.custom] == ["new"]


def test_preview_returns_the_plan_and_changes_nothing() -> None:
    cloud, state = RecordingCloud(), State()
    plan = up(cloud, state, lambda: chain("a"), dry_run=True)
    assert [each.operation for each in plan.steps] == ["create"] * 4
    assert (cloud.things, state.resources, cloud.saves) == ({}, [], [])
    up(cloud, state, lambda: chain("a", first=True))
    before = dict(cloud.things)
    plan = up(cloud, state, lambda: chain("b", first=True), dry_run=True)
    done = [f"{each.operation} {each.name}" for each in plan.steps if each.operation != "same"]
    assert done[:4] == ["delete reader", "delete user", "delete base", "replace base"]
    assert cloud.things == before


def test_unknown_values_skip_apply_callbacks_in_a_preview() -> None:
    seen: list[str] = []

    def body() -> None:
        Thing("one").address.apply(seen.append)

    cloud, state = RecordingCloud(), State()
    up(cloud, state, body, dry_run=True)
    assert seen == []
    up(cloud, state, body)
    assert seen == ["at-one-1"]


def test_deleted_resource_is_created_again() -> None:
    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: chain("a"))
    cloud.verbs()
    lost = next(id_ for id_, each in cloud.things.items() if each["name"] == "user")
    del cloud.things[lost]
    up(cloud, state, lambda: chain("a"))
    assert cloud.verbs() == ["create user", "create reader", "delete reader"]


def test_secret_outputs_are_marked_in_the_state() -> None:
    def body() -> None:
        one = Thing("one", word=pulumi.Output.secret("hush"))
        pulumi.export("address", one.address)
        pulumi.export("word", pulumi.Output.secret("hush"))

    cloud, state = RecordingCloud(), State()
    engine = up(cloud, state, body)
    (thing,) = cloud.things.values()
    assert thing["word"] == "hush"
    assert state.resources[-1].inputs["word"] == Secret("hush")
    assert engine.outputs == {"address": "at-one-1", "word": Secret("hush")}
    assert "hush" not in repr(state)
    assert reveal(engine.outputs)["word"] == "hush"


def test_refusal_of_the_program_is_quoted_and_deletes_nothing() -> None:
    def refusing() -> None:
        raise pulumi.RunError("There are 2 mistakes; nothing was changed:\n  - a\n  - b")

    cloud, state = RecordingCloud(), State()
    up(cloud, state, lambda: chain("a"))
    before = dict(cloud.things)
    with pytest.raises(program_runner.ProgramError) as refused:
        up(cloud, state, refusing)
    assert str(refused.value) == "There are 2 mistakes; nothing was changed:\n  - a\n  - b"
    assert cloud.things == before


def test_two_resources_of_one_name_are_refused() -> None:
    def body() -> None:
        Thing("twin")
        Thing("twin")

    with pytest.raises(ApplyError, match="twin"):
        up(RecordingCloud(), State(), body)


def test_unknown_resource_type_is_named() -> None:
    class Exotic(pulumi.CustomResource):
        def __init__(self) -> None:
            super().__init__("aws:exotic:Thing", "one", {})

    with pytest.raises(ApplyError, match="aws:exotic:Thing"):
        up(RecordingCloud(), State(), lambda: Exotic() and None, dry_run=True)


def test_program_can_catch_a_failed_data_source() -> None:
    caught: list[str] = []

    def body() -> None:
        try:
            pulumi.runtime.invoke("aws:none:getNothing", {})
        except Exception as error:
            caught.append(str(error))
        Thing("one")

    cloud = RecordingCloud()
    engine = engine_of(cloud, State())
    program_runner.run(
        body, engine, {}, project="test", stack_name="dev", config={}, secret_keys=[], on_log=lambda text: None
    )
    assert caught and "getNothing" in caught[0]
    assert cloud.verbs() == ["create one"]
