"""Shared fixtures, without stand-ins: one local cloud, one baked image per base distribution, one launched server.

The local cloud stores its images in a folder of its own (`state_dir`). The images are kept between test sessions, so a
second session bakes nothing if packer/ and provisioning/ are unchanged. Machines, daemons, mounts and loop devices are
removed at the end of the tests, even after a failure or an interrupt. The fixture `cloud` fails if a machine, daemon,
mount or loop device is left.

Imports inside the fixtures keep the unit tests fast, because the import of MLflow alone takes seconds.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from scripts import invoker
from tests.support.leftovers import leftovers, orphaned_network_namespaces, running_processes

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from scripts.local_cloud import LocalCloud
    from tests.support.servers import Server

# No test asserts a duration, because the machines that run the tests are small and busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

BASES = [pytest.param("debian12"), pytest.param("debian13", marks=pytest.mark.slow)]
if "TEST_BASES" in os.environ:  # make test-ubuntu
    BASES = [pytest.param(name) for name in os.environ["TEST_BASES"].split()]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make SIGTERM end the tests like Ctrl-C, so that fixtures remove the resources that they created."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # A program that a shell starts in the background ignores Ctrl-C. The program's child processes ignore Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """After tests that run as root, change the owner of root's files in the checkout to the checkout's owner."""
    invoker.give_back(Path(__file__).parents[1])


@pytest.fixture(scope="session", autouse=True)
def botocore_files_are_parsed_once() -> Iterator[None]:
    """Cache botocore's JSON files. Without a cache, each boto3 session parses the files, which takes up to 0.5 s."""
    from botocore.loaders import JSONFileLoader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", staticmethod(functools.cache(JSONFileLoader().load_file)))
        yield


@pytest.fixture(autouse=True)
def no_session_is_left() -> Iterator[None]:
    """Reset boto3's default session after each test, because this session keeps the first credentials that it found."""
    yield
    boto3: Any = sys.modules.get("boto3")
    if boto3:
        boto3.DEFAULT_SESSION = None


@pytest.fixture(scope="session")
def state_dir() -> Path:
    """Return the folder of the tests' local cloud: $MLFLOW_AMI_LOCAL_CLOUD, or a folder beside the demo's folder."""
    state_home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return Path(os.environ.get("MLFLOW_AMI_LOCAL_CLOUD") or state_home / "mlflow-ami" / "tests").resolve()


@pytest.fixture(scope="session")
def cloud(state_dir: Path) -> Iterator[LocalCloud]:
    """Start the tests' local cloud and stop it at the end. The fixture fails if the cloud left anything on the host."""
    if os.geteuid() != 0:
        pytest.fail("the tests that bake and boot machines need root: run them with `make test` or sudo", pytrace=False)
    from scripts.local_cloud import LocalCloud
    from tests.support.used_alone import used_alone

    os.environ["MLFLOW_AMI_LOCAL_CLOUD"] = str(state_dir)
    # Most tests apply stacks with this project's own engine. Other tests compare this engine with Pulumi's engine.
    os.environ.setdefault("MLFLOW_AMI_ENGINE", "own")
    processes_before = running_processes()
    namespaces_before = orphaned_network_namespaces()
    cloud = LocalCloud(state_dir)
    with used_alone(state_dir) as last_was_killed:
        if last_was_killed:
            print(f"tests: the last session that used {state_dir} was killed: its machines and images are removed")
            cloud.purge()
        try:
            cloud.up()
            yield cloud
        finally:
            cloud.down()
    left = [*leftovers(state_dir, processes_before), *sorted(orphaned_network_namespaces() - namespaces_before)]
    assert not left, "the local cloud is down, but it left on this machine:\n" + "\n".join(left)


@pytest.fixture(scope="session", params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    """The base distribution of the image. Only `make test-all` uses Debian 13."""
    return str(request.param)


@pytest.fixture(scope="session")
def image(cloud: LocalCloud, base: str) -> Mapping[str, Any]:
    """Return an image that bake.py baked on `base`. A new image is baked only if packer/ or provisioning/ changed."""
    from tests.support.servers import script

    baked: dict[str, Any] = json.loads(script("bake.py", "--local", "--if-changed", "--base", base, "--json").stdout)
    return baked


@pytest.fixture(scope="session")
def older_image(cloud: LocalCloud, base: str) -> str:
    """Return the ID of an AMI with MLflow OLDER. A new image is baked only if packer/ or provisioning/ changed."""
    from tests.support.servers import OLDER, script

    baked = script("bake.py", "--local", "--if-changed", "--base", base, "--mlflow-version", OLDER, "--json")
    return str(json.loads(baked.stdout)["ami_id"])


@pytest.fixture(scope="session")
def images_by_packer(cloud: LocalCloud) -> Mapping[str, Mapping[str, Any]]:
    """Return bake.py's output for two images: one by the current Packer, one by Debian's older Packer, which has no
    plug-ins."""
    from scripts.rehearsal import tools
    from tests.support.servers import bake_with

    current, debians = tools.BIN / "packer", Path("/usr/bin/packer")
    if not current.exists() or not debians.exists():
        pytest.skip("a current Packer and Debian's are needed: run `make prepare-tools`")
    return {"current": bake_with(current), "1.6": bake_with(debians)}


@pytest.fixture(scope="session")
def server(cloud: LocalCloud, image: Mapping[str, Any]) -> Iterator[Server]:
    """Launch a server from `image` with the stack's default settings. The server's data is deleted at the end."""
    from tests.support.servers import destroy_server, launch_server

    destroy_server(cloud)
    try:
        yield launch_server("--ami", image["ami_id"])
    finally:
        destroy_server(cloud)


@pytest.fixture(scope="session")
def example_runs(server: Server) -> Mapping[str, str]:
    """Run each example on `server`. Returns a dictionary: file name of the example → ID of the example's run."""
    import mlflow

    from scripts.stand_ins import chat_completions
    from tests.support.servers import EXAMPLES, client_of, run

    with chat_completions.serve() as model_url:
        environment = {**os.environ, **chat_completions.client_environment(model_url), **server.exports}
        for example in EXAMPLES:
            run([sys.executable, str(example)], env=environment)
    with client_of(server):
        found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    sources = {each.info.run_id: Path(each.data.tags.get("mlflow.source.name", "")).name for each in found}
    names = {example.name for example in EXAMPLES}
    return {name: run_id for run_id, name in sources.items() if name in names}


@pytest.fixture
def client(server: Server) -> Iterator[MlflowClient]:
    """MLflow's own client, connected to `server`."""
    from tests.support.servers import client_of

    with client_of(server) as client:
        yield client
