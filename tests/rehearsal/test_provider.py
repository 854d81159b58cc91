"""The rehearsal's provider returns the same responses to Pulumi's engine as pulumi-terraform-bridge."""

from __future__ import annotations

from typing import Any

from pulumi.runtime.proto import provider_pb2

from scripts.rehearsal.provider import GENERATED, checked, difference, outputs
from scripts.rehearsal.resource_types import Kind, physical_name, seeded
from scripts.rehearsal.wire import UNKNOWN, Secret


def nothing(*arguments: Any) -> Any:
    """Do nothing in place of a call to AWS, because the tests in this file make no calls to AWS."""


NAMED = Kind(
    create=nothing,
    read=nothing,
    update=nothing,
    delete=nothing,
    replace_on=frozenset({"name", "zone"}),
    generate={"name": lambda logical, inputs: f"{logical}-0a1b2c3"},
    tagged=True,
)


def test_a_generated_name_lives_as_long_as_the_resource() -> None:
    first = checked(NAMED, "server", {"size": 1}, {}, {})
    assert first == {"size": 1, "name": "server-0a1b2c3", GENERATED: ["name"]}
    kept = checked(NAMED, "renamed", {"size": 2}, first, {})
    assert kept["name"] == "server-0a1b2c3"
    assert difference(NAMED, first, kept).diffs == ["size"]
    # If the program chose the old name and now sets no name, the provider generates a name.
    assert checked(NAMED, "server", {}, {"name": "chosen"}, {})["name"] == "server-0a1b2c3"


def test_names_follow_from_the_seed_that_pulumi_keeps_in_a_plan() -> None:
    def name(seed: bytes) -> str:
        with seeded(seed):
            return physical_name("server", {})

    assert name(b"planned") == name(b"planned") != name(b"another")
    assert name(b"") != name(b"") and physical_name("server", {}) != physical_name("server", {})


def test_resource_tags_override_default_tags() -> None:
    both = checked(NAMED, "server", {"name": "a", "tags": {"Name": "mine"}}, {}, {"Name": "default", "stack": "dev"})
    assert both["tagsAll"] == {"Name": "mine", "stack": "dev"}
    assert both["tags"] == {"Name": "mine"}


def test_replacing_inputs_are_named_and_chosen_names_delete_first() -> None:
    generated = {"name": "a-0a1b2c3", "zone": "a", GENERATED: ["name"]}
    found = difference(NAMED, generated, {**generated, "zone": "b"})
    assert (found.replaces, found.deleteBeforeReplace) == (["zone"], False)
    assert found.detailedDiff["zone"].kind == provider_pb2.PropertyDiff.UPDATE_REPLACE
    chosen = difference(NAMED, {"name": "a", "zone": "a"}, {"name": "a", "zone": "b"})
    assert chosen.deleteBeforeReplace


def test_differences_inside_maps_are_named_by_their_paths() -> None:
    old = {"tags": {"mlflow-ami:stack": "a", "Name": "x"}, "ports": [1]}
    found = difference(NAMED, old, {"tags": {"mlflow-ami:stack": "b"}, "ports": [1, 2]})
    verbs = {path: provider_pb2.PropertyDiff.Kind.Name(each.kind) for path, each in found.detailedDiff.items()}
    assert verbs == {'tags["mlflow-ami:stack"]': "UPDATE", "tags.Name": "DELETE", "ports": "UPDATE"}


def test_unknown_inputs_count_as_changed() -> None:
    assert difference(NAMED, {"name": "a", "zone": "a"}, {"name": "a", "zone": UNKNOWN}).replaces == ["zone"]
    assert difference(NAMED, {"name": "a"}, {"name": "a"}).changes == provider_pb2.DiffResponse.DIFF_NONE


def test_secret_inputs_are_secret_outputs() -> None:
    found = outputs(NAMED, {"value": Secret("hush"), "name": "a", GENERATED: []}, {"value": "hush", "arn": "x"})
    assert found == {"value": Secret("hush"), "name": "a", "arn": "x"}
