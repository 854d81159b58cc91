"""Test the setting `channel`: the selected image, the refused values, and the tag that a launch writes to the image."""

from __future__ import annotations

import pytest

from tests.stack.program import NEW, OLD, VOLUME, Account, Image, data_volume, image_tags, run


def account(**changes: object) -> Account:
    images = {NEW: Image(), OLD: Image(tags=image_tags(image_version="20261001T000000Z"))}
    return Account(**{"images": images, "channels": {"staging": NEW, "production": OLD}, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("channel", "image"), [("staging", NEW), ("production", OLD)])
def test_channel_is_resolved_at_preview_shown_and_exported(channel: str, image: str) -> None:
    for preview in (True, False):
        found = run(account(), amiId=None, channel=channel, preview=preview)
        assert found.refusal == ""
        assert found.one("ec2.Instance").inputs["ami"] == image
        said = [text for _, text in found.log if text.startswith(f"The channel {channel} names {image}")]
        assert len(said) == 1 and f"pulumi config set amiId {image}" in said[0]
        assert (found.outputs["amiId"], found.outputs["channel"]) == (image, channel)


def test_promotion_shows_the_schema_change_of_the_next_up() -> None:
    volumes = data_volume(last=OLD, migration_head="7d34483879f0", migration_count="55")
    found = run(account(volumes=volumes), amiId=None, channel="staging", preview=True)
    assert any("Upgrade over 12 migrations, schema 7d34483879f0 → dc11669786a5" in text for _, text in found.log)


def test_pinning_by_ami_id_looks_up_no_channel() -> None:
    found = run(account(broken={}), channel=None)
    assert "/mlflow-ami/images" not in [asked.get("path") for _, asked in found.lookups]
    assert found.outputs["channel"] == ""


def test_both_set_is_a_mistake() -> None:
    [mistake] = run(account(), channel="staging").stated
    assert mistake == (
        f"amiId and channel are both set: remove one, with `pulumi config rm channel` to pin {NEW}, or with `pulumi "
        "config rm amiId` to follow staging."
    )


def test_neither_set_is_a_mistake() -> None:
    [mistake] = run(account(), amiId=None).stated
    assert mistake.startswith("amiId is missing") and "pulumi config set channel" in mistake


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (account(channels={"production": OLD}), "channel: eu-central-1 has no channel staging (it has production)"),
        (account(channels={}), "channel: eu-central-1 has no channel staging (it has none)"),
        (account(channels={"staging": "ami-0000000000000009f"}), "channel: there is no image ami-0000000000000009f"),
    ],
)
def test_channel_without_image_is_refused(there: Account, reason: str) -> None:
    found = run(there, amiId=None, channel="staging")
    assert [each for each in found.stated if each.startswith(reason)]
    assert [each.type for each in found.registered] == ["pulumi:providers:aws"]


@pytest.mark.parametrize("name", ["Staging", "ami-1", "a/b", "-x"])
def test_wrong_name_is_refused(name: str) -> None:
    assert (
        f"channel: {name!r} is not the name of a channel such as staging."
        in run(account(), amiId=None, channel=name).stated
    )


@pytest.mark.parametrize("name", ["images", "facts"])
def test_stack_name_that_the_images_use_is_refused(name: str) -> None:
    assert any(f"The stack's name {name!r} is taken" in each for each in run(account(), stack_name=name).stated)


def test_launch_leaves_a_tag_on_the_image_that_outlives_it() -> None:
    tag = run(account(volumes=data_volume())).one("ec2.Tag")
    assert (tag.inputs["resourceId"], tag.inputs["key"], tag.inputs["value"]) == (NEW, "mlflow-ami:stack:dev", VOLUME)
    assert tag.request.retainOnDelete
