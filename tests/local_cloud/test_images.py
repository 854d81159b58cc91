"""A machine that starts from an image has the same file system as the machine from which the image was created."""

from __future__ import annotations

import uuid

import pytest
from botocore.exceptions import ClientError

from .conftest import Account, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.slow]


def image_of(account: Account, instance: str, **options: bool) -> str:
    image: str = account.ec2.create_image(InstanceId=instance, Name=uuid.uuid4().hex, **options)["ImageId"]
    account.images.append(image)

    def available() -> bool:
        return bool(account.ec2.describe_images(ImageIds=[image])["Images"][0]["State"] == "available")

    wait_until(available, 120, f"{image} is not available")
    return image


def test_image_holds_the_machine_and_machines_diverge_from_it(account: Account) -> None:
    builder = account.launch()
    account.run(builder, "echo baked > /baked; rm /etc/motd; mkdir /gone && rmdir /gone")
    account.ec2.stop_instances(InstanceIds=[builder])
    account.wait_state(builder, "stopped")
    image = image_of(account, builder)
    account.ec2.start_instances(InstanceIds=[builder])
    account.wait_booted(builder)
    account.run(builder, "echo later > /baked")

    instance = account.launch(image=image)
    assert account.run(instance, "cat /baked") == "baked"
    assert account.cloud.exec(instance, ["test", "-e", "/etc/motd"]).returncode == 1, "deletions are part of an image"
    assert account.run(builder, "cat /baked") == "later"


def test_image_of_a_running_machine_reboots_it_without_no_reboot(account: Account) -> None:
    builder = account.launch()
    account.run(builder, "touch /run/since-boot; echo live > /live")
    image = image_of(account, builder, NoReboot=True)
    account.run(builder, "test -e /run/since-boot")
    instance = account.launch(image=image)
    assert account.run(instance, "cat /live") == "live"
    image_of(account, builder)
    account.wait_booted(builder)
    assert account.cloud.exec(builder, ["test", "-e", "/run/since-boot"]).returncode == 1


def test_images_name_is_taken_once(account: Account) -> None:
    builder = account.launch()
    image = image_of(account, builder, NoReboot=True)
    name = account.ec2.describe_images(ImageIds=[image])["Images"][0]["Name"]
    with pytest.raises(ClientError, match="already in use"):
        account.ec2.create_image(InstanceId=builder, Name=name)


def test_machine_outlives_its_image_and_layers_go_with_their_last_user(account: Account) -> None:
    builder = account.launch()
    account.run(builder, "echo x > /x")
    image = image_of(account, builder, NoReboot=True)
    instance = account.launch(image=image)
    layers = {path.name for path in account.cloud.places.layers.iterdir()}
    snapshot = account.ec2.describe_images(ImageIds=[image])["Images"][0]["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]
    with pytest.raises(ClientError, match=r"InUse|in use"):
        account.ec2.delete_snapshot(SnapshotId=snapshot)
    account.ec2.deregister_image(ImageId=image)
    account.images.remove(image)
    account.ec2.delete_snapshot(SnapshotId=snapshot)
    with pytest.raises(ClientError, match="InvalidAMIID"):
        account.launch(image=image, wait=False)
    account.ec2.reboot_instances(InstanceIds=[instance])
    account.wait_booted(instance)
    assert account.run(instance, "cat /x") == "x"
    account.ec2.terminate_instances(InstanceIds=[instance])
    account.wait_state(instance, "terminated")
    wait_until(
        lambda: len({path.name for path in account.cloud.places.layers.iterdir()}) == len(layers) - 1,
        20,
        "the image's layer was not deleted",
    )


def test_imds_support_of_an_image_applies_to_its_machines(account: Account) -> None:
    builder = account.launch(MetadataOptions={"HttpTokens": "optional"})
    image = image_of(account, builder, NoReboot=True)
    account.ec2.modify_image_attribute(ImageId=image, ImdsSupport={"Value": "v2.0"})
    assert account.ec2.describe_images(ImageIds=[image])["Images"][0]["ImdsSupport"] == "v2.0"
    instance = account.launch(image=image, MetadataOptions={})
    assert account.describe(instance)["MetadataOptions"]["HttpTokens"] == "required"
