"""The machines of the local cloud: rootful podman containers that run systemd and imitate EC2 instances.

A container exists only while its machine is on. A machine's root file system (file_systems.py) and volumes (volumes.py)
remain while the machine is off.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.local_cloud import imds_server, name_server, namespaces, volumes
from scripts.local_cloud.base_images import TRUSTED
from scripts.local_cloud.layout import Allotment, LocalCloudError, Places

OUTWARD_NETWORK = "198.18.0.0/24"
"""slirp4netns's address range in each machine. No VPC uses the range, because RFC 2544 reserves it for benchmarks."""

OUTWARD_DNS = "198.18.0.3"
INTERFACE = "ens5"
METADATA_INTERFACE = "imds"
SERVICES = (imds_server.ADDRESS, name_server.ADDRESS)
FIRMWARE_SECONDS = 60
STOP_SECONDS = 60
"""Maximum seconds for a machine's shutdown. A machine whose shutdown takes longer is killed. EC2 waits some minutes."""

INOTIFY_INSTANCES = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_INSTANCES_WANTED = 1024
"""Limit that `allow_many` sets on inotify instances per user. Each machine uses about 15. Linux's default is 128."""

POWERED_OFF, REBOOTED = 128 + signal.SIGINT, 128 + signal.SIGHUP
"""Exit statuses of a machine's init process after a power-off and after a reboot. See PID namespaces in reboot(2)."""


@dataclass(frozen=True)
class Disk:
    """An attached volume: its ID, and its loop device on the host."""

    volume: str
    loop: str


@dataclass(frozen=True)
class Size:
    cores: int
    memory_mib: int


@dataclass
class Machine:
    """A running machine. A `Machine` object owns its file descriptors.

    `namespace` is the machine's network namespace. `beyond` is a second network namespace, which is linked to the
    machine and contains the metadata service. Closing `slirp_exit` ends slirp4netns.
    """

    instance: str
    pid: int
    namespace: int
    beyond: int
    pidfd: int
    slirp_exit: int = -1
    slirp: subprocess.Popen[bytes] | None = None
    disks: dict[str, str] = field(default_factory=dict)  # volume ID → device name under /dev


class Podman:
    """Runs podman. All files of podman are in the folders of this local cloud, so that `purge` can remove the files."""

    def __init__(self, places: Places, allotment: Allotment) -> None:
        run_dir = allotment.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self.prefix = ["podman", "--root", str(places.containers), "--runroot", str(run_dir / "containers")]
        self.prefix += ["--storage-driver", "vfs", "--events-backend", "none"]
        self.prefix += ["--cgroup-manager", "cgroupfs"]
        if not has_unified_cgroups():
            self.prefix += ["--runtime", "runc"]  # crun fails if cgroups are in hybrid mode

    def run(self, *argv: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*self.prefix, *argv], capture_output=True, text=True, timeout=timeout)
        if check and done.returncode != 0:
            raise LocalCloudError(f"podman {argv[0]} failed: {done.stderr.strip()[-500:]}")
        return done

    def stop(self, name: str, *, seconds: int) -> None:
        """Stop a machine and return when it is off. After `seconds`, podman sends SIGKILL. Raises LocalCloudError.

        The command `podman stop` is repeated, because it fails if a killed process does not end within some seconds. A
        killed process that waits for a busy disk needs more time to end.
        """
        tries = 10
        for left in reversed(range(tries)):
            try:
                self.run("stop", "--time", str(seconds), "--ignore", name, timeout=seconds + 60)
            except LocalCloudError:
                if not left:
                    raise
                seconds = 0
                time.sleep(3)
            else:
                return

    def names(self) -> list[str]:
        return self.run("ps", "--all", "--format", "{{.Names}}").stdout.split()

    def exit_status(self, name: str) -> int:
        """Return the exit status of a machine's init process. Waits until podman has recorded the exit status."""
        done = self.run("wait", name, check=False)
        return int(done.stdout.strip() or -1) if done.returncode == 0 else -1

    def remove(self, name: str) -> None:
        self.run("rm", "--force", "--time", "0", "--ignore", name)


def allow_many() -> None:
    """If the host's limit on inotify instances is too low for many machines, raise it until the host's next boot.

    Raises LocalCloudError if this process has no permission to change the limit.
    """
    limit = int(INOTIFY_INSTANCES.read_text())
    if limit < INOTIFY_INSTANCES_WANTED:
        try:
            INOTIFY_INSTANCES.write_text(str(INOTIFY_INSTANCES_WANTED))
        except OSError:
            raise LocalCloudError(
                f"this host allows {limit} inotify instances per user, and root needs about 15 per systemd machine: "
                f"run `sysctl fs.inotify.max_user_instances={INOTIFY_INSTANCES_WANTED}` where the host is configured"
            ) from None


def has_unified_cgroups() -> bool:
    return Path("/sys/fs/cgroup/cgroup.controllers").exists()


def boot(
    podman: Podman,
    instance: str,
    root: Path,
    hostname: str,
    size: Size,
    private_address: str,
    disks: Iterable[Disk],
    console: Path,
    pid_file: Path,
    before: Callable[[int, int], None],
) -> Machine:
    """Start a machine from the file system mounted at `root`.

    `before` is called with the machine's network namespace and the namespace of its metadata service. The call occurs
    after the addresses are up and before the machine's init starts. Sockets that `before` opens thus listen during the
    whole boot. Raises LocalCloudError.
    """
    namespace = namespaces.create()
    try:
        slirp, slirp_exit = _connect_outward(namespace)
        beyond = _connect_metadata(namespace, private_address)
        before(namespace, beyond)
        names = {disk.volume: f"nvme{index}n1" for index, disk in enumerate(disks, start=1)}
        _write_resolver(root)
        for stale in (console, pid_file):
            stale.unlink(missing_ok=True)
        argv = ["run", "--detach", "--tty", "--name", instance, "--hostname", hostname, "--systemd=always"]
        argv += ["--privileged", "--no-hosts", "--dns=none", "--network", f"ns:/proc/{os.getpid()}/fd/{namespace}"]
        argv += ["--stop-signal", "SIGRTMIN+3", "--log-driver", "k8s-file", "--log-opt", f"path={console}"]
        argv += [*_limits(), *_size_options(size), "--pidfile", str(pid_file), "--rootfs", str(root)]
        podman.run(*argv, "/bin/sh", "-c", _firmware(names, disks))
        pid = running_pid(pid_file)
        if pid is None:
            raise LocalCloudError(f"{instance} stopped as soon as it started: {console_text(console)[-500:]}")
        _await_init(pid)
        return Machine(instance, pid, namespace, beyond, os.pidfd_open(pid), slirp_exit, slirp, names)
    except BaseException:
        os.close(namespace)
        podman.run("rm", "--force", "--time", "0", "--ignore", instance, check=False)
        raise


def _await_init(pid: int) -> None:
    """Wait until the machine's init has replaced the shell that runs the commands of `_firmware`. These commands delete
    all block devices, and would also delete a volume that is attached too early."""
    deadline = time.monotonic() + FIRMWARE_SECONDS
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() != "sh":
                return
        except OSError:
            return
        time.sleep(0.01)


def adopt(instance: str, private_address: str, pid_file: Path, before: Callable[[int, int], None]) -> Machine | None:
    """Take over a running machine that an earlier daemon started. Returns None if the machine is not running."""
    pid = running_pid(pid_file)
    if pid is None:
        return None
    namespace = namespaces.of_process(pid)
    pidfd = os.pidfd_open(pid)
    slirp, slirp_exit = _connect_outward(namespace)
    beyond = _connect_metadata(namespace, private_address)
    before(namespace, beyond)
    return Machine(instance, pid, namespace, beyond, pidfd, slirp_exit, slirp, _disks_present(pid))


def disconnect(machine: Machine) -> None:
    """End slirp4netns and close the file descriptors of `machine`. The machine itself is not stopped."""
    if machine.slirp is not None:
        os.close(machine.slirp_exit)
        with contextlib.suppress(subprocess.TimeoutExpired):
            machine.slirp.wait(5)
        machine.slirp = None
    for descriptor in (machine.namespace, machine.beyond, machine.pidfd):
        os.close(descriptor)


def kill(machine: Machine) -> None:
    """Kill the machine at once, like a crash. The kernel ends all processes of a machine when its init process ends."""
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(machine.pidfd, signal.SIGKILL)


def stop(podman: Podman, machine: Machine, *, force: bool = False) -> None:
    """Shut the machine down and wait until it is off. With `force`, kill the machine first."""
    if force:
        kill(machine)
    podman.stop(machine.instance, seconds=STOP_SECONDS)


def attach(machine: Machine, disk: Disk) -> str:
    """Attach a volume to a running machine with the device names of EBS. Returns the device's name under /dev."""
    if disk.volume in machine.disks:
        return machine.disks[disk.volume]
    taken = set(machine.disks.values())
    name = next(f"nvme{index}n1" for index in range(1, 64) if f"nvme{index}n1" not in taken)
    dev = Path(f"/proc/{machine.pid}/root/dev")
    node = dev / name
    os.mknod(node, stat.S_IFBLK | 0o660, Path(disk.loop).stat().st_rdev)
    shutil.chown(node, 0, 6)  # group disk
    (dev / "disk/by-id").mkdir(parents=True, exist_ok=True)
    (dev / "disk/by-id" / by_id_name(disk.volume)).symlink_to(f"../../{name}")
    machine.disks[disk.volume] = name
    return name


def is_mounted(machine: Machine, volume: str) -> bool:
    """Return whether the volume is mounted in the machine."""
    try:
        device = Path(f"/proc/{machine.pid}/root/dev/{machine.disks[volume]}").stat().st_rdev
    except (KeyError, OSError):
        return False
    return volumes.is_mounted_in(machine.pid, device)


def detach(machine: Machine, volume: str) -> bool:
    """Detach a volume from a running machine. If the volume is mounted, only return False."""
    name = machine.disks.get(volume)
    if name is None:
        return True
    if is_mounted(machine, volume):
        return False
    dev = Path(f"/proc/{machine.pid}/root/dev")
    with contextlib.suppress(OSError):
        (dev / "disk/by-id" / by_id_name(volume)).unlink(missing_ok=True)
        (dev / name).unlink(missing_ok=True)
    del machine.disks[volume]
    return True


def by_id_name(volume: str) -> str:
    """Return the name that udev gives to an EBS volume under /dev/disk/by-id."""
    return f"nvme-Amazon_Elastic_Block_Store_{volume.replace('-', '')}"


def console_text(console: Path) -> str:
    """Return the machine's console output, without the time stamps of conmon's log."""
    if not console.exists():
        return ""
    lines = console.read_text(errors="replace").splitlines()
    return "\n".join(re.sub(r"^\S+ std(?:out|err) [FP] ", "", line).rstrip("\r") for line in lines)


def running_pid(pid_file: Path) -> int | None:
    """Return the PID of a machine's init process, or None if the machine is off.

    A podman command for the PID takes 1000 times longer. If the kernel has reused the PID, the function returns None,
    because the new process has a different root file system.
    """
    try:
        pid = int(pid_file.read_text())
        mounts = Path(f"/proc/{pid}/mountinfo").read_text()
    except (OSError, ValueError):
        return None
    return pid if f"{pid_file.parent}/" in mounts else None


def enter_command(pid: int, argv: Sequence[str]) -> list[str]:
    """Return the command that runs `argv` as root inside a machine. `pid` is the PID of the machine's init process."""
    inside = ["nsenter", "--target", str(pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
    environment = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
    environment += [f"TERM={os.environ.get('TERM', 'dumb')}", "USER=root", "LOGNAME=root"]
    environment += [f"AWS_CA_BUNDLE={TRUSTED}"]  # a login shell reads this variable from /etc/environment
    return [*inside, "--root", "--wdns=/root", "--", "env", "-i", *environment, *argv]


def wait_for_exit(machine: Machine) -> None:
    """Wait until the machine's init process has ended."""
    poller = select.poll()
    poller.register(machine.pidfd, select.POLLIN)
    poller.poll()


def _firmware(names: Mapping[str, str], disks: Iterable[Disk]) -> str:
    """Return the shell commands that set up the machine's devices and mounts before its init starts.

    /sys and /proc/sys are read-only, except /proc/sys/net, so that the machine cannot change the host's settings. Each
    start of a machine has a new boot ID. The host's disks are removed from /dev, and the machine's volumes are added.
    The journal and /tmp are on the root file system, as on a server. podman would put both folders in memory. Mount
    propagation is shared, as on a server, so that services that are already running see later mounts.
    """
    lines = [
        "mount --make-rshared /",
        "mount -o remount,ro,bind /sys",
        "mount --bind /proc/sys /proc/sys",
        "mount --bind /proc/sys/net /proc/sys/net",
        "cat /proc/sys/kernel/random/uuid > /run/boot-id",
        "mount --bind /run/boot-id /proc/sys/kernel/random/boot_id",
        "mount -o remount,ro,bind /proc/sys",
        "umount /var/log/journal /tmp",
        "find /dev -type b -delete",
        "rm -f /dev/kmsg /dev/mem /dev/loop-control",
        "mkdir -p /dev/disk/by-id",
    ]
    for disk in disks:
        device, name = Path(disk.loop).stat().st_rdev, names[disk.volume]
        lines.append(f"mknod -m 660 /dev/{name} b {os.major(device)} {os.minor(device)}")
        lines.append(f"chgrp 6 /dev/{name}")
        lines.append(f"ln -s ../../{name} /dev/disk/by-id/{by_id_name(disk.volume)}")
    return "; ".join([*lines, "exec /sbin/init"])


def _disks_present(pid: int) -> dict[str, str]:
    """Return the volumes of a running machine: volume ID → device name under /dev."""
    found = {}
    folder = Path(f"/proc/{pid}/root/dev/disk/by-id")
    for link in folder.glob("nvme-Amazon_Elastic_Block_Store_vol*"):
        volume = link.name.removeprefix("nvme-Amazon_Elastic_Block_Store_").replace("vol", "vol-", 1)
        found[volume] = link.readlink().name
    return found


def _size_options(size: Size) -> list[str]:
    host_cores = sorted(os.sched_getaffinity(0))
    cores = host_cores[: max(1, min(size.cores, len(host_cores)))]
    memory = f"{size.memory_mib}m"
    return [
        "--cpuset-cpus",
        ",".join(map(str, cores)),
        "--memory",
        memory,
        "--memory-swap",
        memory,
        "--shm-size",  # half of the memory, as in systemd. podman's default, 64 MiB, is too little for PostgreSQL
        f"{size.memory_mib // 2}m",
        "--pids-limit",
        "0",
    ]


def _limits() -> list[str]:
    """Return podman options for a server's usual resource limits, at most the host's hard limits. By default, podman
    sets only half of the limit nproc."""
    import resource

    options = []
    for name, which, wanted in (("nofile", resource.RLIMIT_NOFILE, 1048576), ("nproc", resource.RLIMIT_NPROC, 32768)):
        hard = resource.getrlimit(which)[1]
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        options += ["--ulimit", f"{name}={limit}:{limit}"]
    return options


def _write_resolver(root: Path) -> None:
    """Write the cloud's name server and slirp4netns's to resolv.conf. The resolver asks the second for a name that the
    first refuses. podman's choice, the host's name server, may be unreachable."""
    target = root / "etc/resolv.conf"
    if target.is_symlink():
        target.unlink()
    target.write_text(f"nameserver {name_server.ADDRESS}\nnameserver {OUTWARD_DNS}\n")


def _connect_outward(namespace: int) -> tuple[subprocess.Popen[bytes], int]:
    """Start slirp4netns to connect the namespace to the internet. Closing the returned descriptor ends slirp4netns."""
    read_end, write_end = os.pipe()
    ready_read, ready_write = os.pipe()
    argv = ["slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", f"--cidr={OUTWARD_NETWORK}"]
    argv += [f"--exit-fd={read_end}", f"--ready-fd={ready_write}", "--netns-type=path"]
    argv += [f"/proc/{os.getpid()}/fd/{namespace}", INTERFACE]
    try:
        slirp = subprocess.Popen(
            argv,
            pass_fds=(read_end, ready_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    finally:
        os.close(read_end)
        os.close(ready_write)
    try:
        if os.read(ready_read, 1) != b"1":
            assert slirp.stderr is not None
            raise LocalCloudError(f"slirp4netns did not start: {slirp.stderr.read().decode().strip()[-300:]}")
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(ready_read)
    return slirp, write_end


def _connect_metadata(namespace: int, private_address: str) -> int:
    """Link the machine to a second network namespace for the metadata service and the name server, and return the
    second namespace.

    If the metadata service listened in the machine's own namespace, no program in the machine could listen on port 80
    of all addresses.
    """
    beyond = namespaces.create()
    try:
        namespaces.run_inside(
            namespace,
            [
                f"link add {METADATA_INTERFACE} type veth peer name beyond netns /proc/{os.getpid()}/fd/{beyond}",
                f"address replace {private_address}/32 dev {INTERFACE}",
                f"link set {METADATA_INTERFACE} up",
                *(f"route replace {each}/32 dev {METADATA_INTERFACE} src {private_address}" for each in SERVICES),
            ],
        )
        namespaces.run_inside(
            beyond,
            [
                *(f"address add {each}/32 dev beyond" for each in SERVICES),
                "link set beyond up",
                f"route add {private_address}/32 dev beyond src {imds_server.ADDRESS}",
            ],
        )
    except BaseException:
        os.close(beyond)
        raise
    return beyond
