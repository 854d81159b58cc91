"""Instances of the local cloud behave as the documentation of EC2 states."""

from __future__ import annotations

import subprocess

import pytest
from botocore.exceptions import ClientError

from .conftest import Account, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.slow]


def test_system_is_fully_up(account: Account, machine: str) -> None:
    assert account.run(machine, "systemctl is-system-running") == "running"
    assert account.run(machine, "systemctl --failed --no-legend") == ""


def test_instance_type_sets_cores_and_memory(account: Account, machine: str) -> None:
    assert account.run(machine, "nproc") == str(min(2, int(subprocess.check_output(["nproc"]))))
    limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null | head -n 1"
    assert int(account.run(machine, limits)) == 1024**3  # t3.micro
    assert int(account.run(machine, "stat --file-system --format=%b /dev/shm")) * 4096 == 1024**3 // 2


def test_key_pair_opens_ssh_for_the_login_user(account: Account, machine: str) -> None:
    wait_until(lambda: account.ssh(machine, "true").returncode == 0, 30, "ssh does not answer")
    assert account.ssh(machine, "sudo id -un").stdout.strip() == "root"


def test_machine_reaches_the_internet_and_not_the_hosts_loopback(account: Account, machine: str) -> None:
    account.run(machine, "getent hosts deb.debian.org")
    refused = account.cloud.exec(
        machine, ["curl", "-s", "--max-time", "3", f"http://{account.cloud.allotment.inner_address}:9333"]
    )
    assert refused.returncode != 0


def test_hosts_hardware_is_out_of_reach(account: Account, machine: str) -> None:
    assert account.run(machine, "find /dev -type b") == ""
    assert account.cloud.exec(machine, ["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq"]).returncode != 0
    account.run(machine, "sysctl -q -w net.ipv4.ip_forward=1")


def test_root_file_system_survives_stop_and_start(account: Account) -> None:
    instance = account.launch()
    account.run(instance, "echo kept > /var/lib/kept; echo gone > /run/gone")
    boot = account.run(instance, "cat /proc/sys/kernel/random/boot_id")
    account.ec2.stop_instances(InstanceIds=[instance])
    assert account.state(instance) in ("stopping", "stopped")
    account.wait_state(instance, "stopped")
    assert "PublicIpAddress" not in account.describe(instance)
    with pytest.raises(Exception, match="not running"):
        account.cloud.exec(instance, ["true"])
    account.ec2.start_instances(InstanceIds=[instance])
    account.wait_booted(instance)
    assert account.run(instance, "cat /var/lib/kept; ls /run/gone 2>&1 || true").splitlines()[0] == "kept"
    assert account.cloud.exec(instance, ["test", "-e", "/run/gone"]).returncode != 0
    assert account.run(instance, "cat /proc/sys/kernel/random/boot_id") != boot
    assert boot.replace("-", "") in account.run(instance, "journalctl --list-boots")


def test_reboot_keeps_the_address(account: Account) -> None:
    instance = account.launch()
    address = account.address(instance)
    account.run(instance, "touch /run/before")
    account.ec2.reboot_instances(InstanceIds=[instance])
    wait_until(lambda: account.cloud.exec_or_none(instance, ["test", "-e", "/run/before"]) == 1, 120, "not rebooted")
    account.wait_booted(instance)
    assert account.address(instance) == address


def test_poweroff_from_inside_stops_the_instance(account: Account) -> None:
    instance = account.launch()
    account.cloud.exec(instance, ["systemctl", "poweroff", "--no-block"])
    account.wait_state(instance, "stopped")
    reason = account.describe(instance)["StateReason"]["Code"]
    assert reason == "Client.InstanceInitiatedShutdown"


def test_poweroff_from_inside_terminates_if_configured(account: Account) -> None:
    instance = account.launch(InstanceInitiatedShutdownBehavior="terminate")
    account.cloud.exec(instance, ["systemctl", "poweroff", "--no-block"])
    account.wait_state(instance, "terminated")


def test_reboot_from_inside_boots_again(account: Account) -> None:
    instance = account.launch()
    account.run(instance, "touch /run/before")
    account.cloud.exec(instance, ["systemctl", "reboot", "--no-block"])
    wait_until(lambda: account.cloud.exec_or_none(instance, ["test", "-e", "/run/before"]) == 1, 120, "not rebooted")
    account.wait_booted(instance)
    assert account.state(instance) == "running"


def test_forced_stop_is_a_crash(account: Account) -> None:
    instance = account.launch()
    account.run(instance, "systemctl is-active cron.service; echo left > /var/lib/left; sync")
    account.ec2.stop_instances(InstanceIds=[instance], Force=True)
    account.wait_state(instance, "stopped", seconds=15)
    account.ec2.start_instances(InstanceIds=[instance])
    account.wait_booted(instance)
    assert account.run(instance, "cat /var/lib/left") == "left"
    last = account.run(instance, "journalctl -b -1 -o cat | tail -n 5")
    assert "Reached target" not in last.splitlines()[-1]


def test_console_output_contains_the_boot(account: Account, machine: str) -> None:
    output = account.ec2.get_console_output(InstanceId=machine)["Output"]
    assert "Welcome to" in output
    assert "Reached target" in output


def test_machine_with_an_unknown_image_or_type_is_refused(account: Account) -> None:
    with pytest.raises(ClientError, match="InvalidAMIID"):
        account.launch(image="ami-0123456789abcdef0", wait=False)
    with pytest.raises(ClientError, match="InvalidInstanceType"):
        account.launch(InstanceType="t3.gigantic", wait=False)


def test_machine_that_stops_can_be_terminated(account: Account) -> None:
    instance = account.launch()
    account.ec2.stop_instances(InstanceIds=[instance])
    account.ec2.terminate_instances(InstanceIds=[instance])
    account.wait_state(instance, "terminated")


def test_retried_launch_starts_one_machine(account: Account) -> None:
    first = account.launch(wait=False, ClientToken="the same call")
    again = account.launch(wait=False, ClientToken="the same call")
    other = account.launch(wait=False, ClientToken="another call")
    assert first == again != other


def test_terminated_machine_leaves_nothing(account: Account) -> None:
    instance = account.launch()
    folder = account.cloud.places.machines / instance
    assert folder.exists()
    account.ec2.terminate_instances(InstanceIds=[instance])
    account.wait_state(instance, "terminated")
    assert not folder.exists()
    assert instance not in subprocess.check_output(["mount"], text=True)
