"""Root file systems: an image is a stack of layers, and a machine is such a stack with a writable folder on top.

Layers are plain folders joined by overlayfs. CreateImage is a rename: the machine's writable folder becomes the image's
newest layer, and the machine gets a new writable folder above this layer. Thus CreateImage takes no time and no space,
even for a large image.
"""

from __future__ import annotations

import json
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from scripts.local_cloud.layout import Places, write_json


@dataclass(frozen=True)
class RootFileSystem:
    """A machine's root file system on disk."""

    folder: Path

    @property
    def mounted_at(self) -> Path:
        return self.folder / "root"

    @property
    def writable(self) -> Path:
        return self.folder / "writable"

    @property
    def record(self) -> Path:
        return self.folder / "layers.json"

    @property
    def layers(self) -> list[str]:
        """Newest first."""
        layers: list[str] = json.loads(self.record.read_text())
        return layers


def image_layers(places: Places, snapshot: str) -> list[str] | None:
    """Return the layers of a root snapshot, newest first; None if no layers are recorded for this snapshot."""
    record = places.images / f"{snapshot}.json"
    if not record.exists():
        return None
    layers: list[str] = json.loads(record.read_text())
    return layers


def record_image(places: Places, snapshot: str, layers: list[str]) -> None:
    write_json(places.images / f"{snapshot}.json", layers)


def create(places: Places, instance: str, layers: list[str]) -> RootFileSystem:
    """Create a root file system for an instance above an image's layers."""
    root = RootFileSystem(places.machines / instance)
    root.folder.mkdir(mode=0o700, exist_ok=True)
    write_json(root.record, layers)
    return root


def mount(places: Places, root: RootFileSystem) -> Path:
    """Mount the machine's root file system if it is not mounted, and return the mount point."""
    if is_mounted(root.mounted_at):
        return root.mounted_at
    newest = places.layers / root.layers[0]
    if not newest.exists() and (root.writable / "upper").exists():
        (root.writable / "upper").rename(newest)
    _make_writable(root)
    root.mounted_at.mkdir(exist_ok=True)
    # The layers' paths are relative, because overlayfs accepts at most one memory page of options.
    lower = ":".join(root.layers)
    options = f"lowerdir={lower},upperdir={root.writable / 'upper'},workdir={root.writable / 'work'}"
    subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, str(root.mounted_at)],
        check=True,
        cwd=places.layers,
        capture_output=True,
    )
    return root.mounted_at


def unmount(root: RootFileSystem) -> None:
    if is_mounted(root.mounted_at):
        subprocess.run(["umount", "--lazy", str(root.mounted_at)], check=True, capture_output=True)


def is_mounted(path: Path) -> bool:
    return path.is_mount()


def freeze(places: Places, root: RootFileSystem) -> list[str]:
    """Turn the machine's writable folder into a layer and return all layers. The machine's root must not be mounted."""
    if not (root.writable / "upper").exists():
        return root.layers
    name = uuid.uuid4().hex[:12]
    layers = [name, *root.layers]
    # The record is written before the rename. If the daemon crashes before the rename, `mount` completes the rename.
    write_json(root.record, layers)
    (root.writable / "upper").rename(places.layers / name)
    delete_tree(root.writable)
    return layers


def copy_live(places: Places, root: RootFileSystem) -> Path:
    """Copy a running machine's writable folder, for CreateImage with NoReboot. `adopt` turns the copy into a layer."""
    copied = places.making / uuid.uuid4().hex[:12]
    subprocess.run(
        ["cp", "-a", "--reflink=auto", str(root.writable / "upper"), str(copied)], check=True, capture_output=True
    )
    return copied


def adopt(places: Places, made: Path) -> str:
    """Turn a folder in `places.making` into a layer and return its name. The caller must record the layer at once,
    because `discard_unused_layers` removes each layer that no record names."""
    made.rename(places.layers / made.name)
    return made.name


def delete(root: RootFileSystem) -> None:
    unmount(root)
    delete_tree(root.folder)


def delete_tree(folder: Path) -> None:
    """Delete a folder, but not the content of file systems that are mounted below it."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=False, capture_output=True)


def discard_unused_layers(places: Places) -> None:
    """Move unused layers to the trash folder, because a move takes less time than a deletion. A layer is unused if no
    image and no machine uses the layer."""
    used: set[str] = set()
    for record in [*places.images.glob("*.json"), *places.machines.glob("*/layers.json")]:
        used.update(json.loads(record.read_text()))
    for layer in places.layers.iterdir():
        if layer.name not in used:
            layer.rename(places.trash / f"{layer.name}-{uuid.uuid4().hex[:8]}")


def empty(folder: Path) -> None:
    for entry in folder.iterdir():
        delete_tree(entry)


def _make_writable(root: RootFileSystem) -> None:
    for name in ("upper", "work"):
        (root.writable / name).mkdir(parents=True, exist_ok=True)
    (root.writable / "upper").chmod(0o755)
