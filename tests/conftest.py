"""Shared fixtures: one local cloud, one baked image per base, one launched server, none of them a stand-in.

The local cloud keeps its images between test runs in a folder of its own (`state_dir`), so a second run bakes nothing
while packer/ and provisioning/ are unchanged. Machines, daemons, mounts and loop devices are removed when the tests
end, even if they failed or were interrupted; `cloud` fails if anything is left.

Imports inside the fixtures keep the unit tests fast: MLflow alone takes seconds to import.
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

# No test asserts a duration: the machines that run the tests are small and busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

BASES = [pytest.param("debian12"), pytest.param("debian13", marks=pytest.mark.slow)]
if "TEST_BASES" in os.environ:  # make test-ubuntu
    BASES = [pytest.param(name) for name in os.environ["TEST_BASES"].split()]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make SIGTERM end the tests like Ctrl-C, so that fixtures remove what they started."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # Programs that a shell starts in the background ignore Ctrl-C, and so do their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Tests that run as root leave no file owned by root in the checkout of the sudo user."""
    invoker.give_back(Path(__file__).parents[1])


@pytest.fixture(scope="session", autouse=True)
def botocore_files_are_parsed_once() -> Iterator[None]:
    """Each new session of boto3 parses the JSON of its services again, which takes up to half a second."""
    from botocore.loaders import JSONFileLoader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", staticmethod(functools.cache(JSONFileLoader().load_file)))
        yield


@pytest.fixture(autouse=True)
def no_session_is_left() -> Iterator[None]:
    """Reset boto3's default session, which keeps the credentials that it found first."""
    yield
    boto3: Any = sys.modules.get("boto3")
    if boto3:
        boto3.DEFAULT_SESSION = None


@pytest.fixture(scope="session")
def state_dir() -> Path:
    """Folder of the tests' local cloud: $MLFLOW_AMI_LOCAL_CLOUD, or a folder beside the demo's."""
    state_home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return Path(os.environ.get("MLFLOW_AMI_LOCAL_CLOUD") or state_home / "mlflow-ami" / "tests").resolve()


@pytest.fixture(scope="session")
def cloud(state_dir: Path) -> Iterator[LocalCloud]:
    """The tests' local cloud, started; stopped at the end, with nothing left on the machine."""
    if os.geteuid() != 0:
        pytest.fail("the tests that bake and boot machines need root: run them with `make test` or sudo", pytrace=False)
    from scripts.local_cloud import LocalCloud
    from tests.support.used_alone import used_alone

    os.environ["MLFLOW_AMI_LOCAL_CLOUD"] = str(state_dir)
    # Other tests compare our engine with Pulumi's.
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
    """The distribution of the image; Debian 13 runs only in `make test-all`."""
    return str(request.param)


@pytest.fixture(scope="session")
def image(cloud: LocalCloud, base: str) -> Mapping[str, Any]:
    """The image baked on `base` by scripts/bake.py, baked again only if its inputs changed."""
    from tests.support.servers import script

    baked: dict[str, Any] = json.loads(script("bake.py", "--local", "--if-changed", "--base", base, "--json").stdout)
    return baked


@pytest.fixture(scope="session")
def older_image(cloud: LocalCloud, base: str) -> str:
    """The AMI with MLflow OLDER, baked again only if its inputs changed."""
    from tests.support.servers import OLDER, script

    baked = script("bake.py", "--local", "--if-changed", "--base", base, "--mlflow-version", OLDER, "--json")
    return str(json.loads(baked.stdout)["ami_id"])


@pytest.fixture(scope="session")
def images_by_packer(cloud: LocalCloud) -> Mapping[str, Mapping[str, Any]]:
    """The output of bake.py for one image by the current Packer and one by Debian's older Packer, which has no
    plug-ins."""
    from scripts.rehearsal import tools
    from tests.support.servers import bake_with

    current, debians = tools.BIN / "packer", Path("/usr/bin/packer")
    if not current.exists() or not debians.exists():
        pytest.skip("a current Packer and Debian's are needed: run `make prepare-tools`")
    return {"current": bake_with(current), "1.6": bake_with(debians)}


@pytest.fixture(scope="session")
def server(cloud: LocalCloud, image: Mapping[str, Any]) -> Iterator[Server]:
    """A server launched from `image` with the stack's defaults; its data is deleted at the end."""
    from tests.support.servers import destroy_server, launch_server

    destroy_server(cloud)
    try:
        yield launch_server("--ami", image["ami_id"])
    finally:
        destroy_server(cloud)


@pytest.fixture(scope="session")
def example_runs(server: Server) -> Mapping[str, str]:
    """ID of the run that each example logged to `server`, by the example's file name."""
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
    """The real MLflow client of `server`."""
    from tests.support.servers import client_of

    with client_of(server) as client:
        yield client
