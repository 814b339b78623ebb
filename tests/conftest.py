"""Fixtures for every test: a PostgreSQL for the run, a database for the test."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from proxy.local.postgres import ClusterAddress
from tests.memory import fast_directory
from tests.postgres import Database, fresh_database, remove_abandoned_clusters, remove_cluster, running_cluster

RUN_ID = pytest.StashKey[str]()
WORKERS_MAX = 12

# The same examples in every run, and no clock among the judges: the machine may be busy with something else.
hypothesis.settings.register_profile(
    "farebox",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.load_profile("farebox")


def pytest_configure(config: pytest.Config) -> None:
    worker: dict[str, str] = getattr(config, "workerinput", {})
    config.stash[RUN_ID] = worker["farebox_run"] if worker else _new_run_id()
    if not worker:
        remove_abandoned_clusters()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and RUN_ID in config.stash:
        remove_cluster(config.stash[RUN_ID])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Tell an xdist worker which run it belongs to."""
    node.workerinput["farebox_run"] = node.config.stash[RUN_ID]  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: many tests wait for processes, leases and deadlines, and some measure these.
    At most so many, since all of them share PostgreSQL's connections."""
    return min((os.cpu_count() or 1) + 1, WORKERS_MAX)


@pytest.fixture
def state_path() -> Iterator[Path]:
    """Where a test may have a state directory of its own. Its path is short, as a socket's must be, and everybody may
    pass through it: else PostgreSQL, started by root, would keep its data outside, and they would stay there."""
    parent = Path(tempfile.mkdtemp(prefix="fb", dir=fast_directory()))
    parent.chmod(0o755)
    yield parent / "state"
    shutil.rmtree(parent, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[ClusterAddress]:
    """The run's PostgreSQL, shared by all workers; for tests that make databases or roles themselves."""
    with running_cluster(request.config.stash[RUN_ID]) as address:
        yield address


@pytest.fixture
def database(cluster: ClusterAddress) -> Iterator[Database]:
    """A migrated, empty database of this test's own."""
    with fresh_database(cluster) as found:
        yield found


@pytest.fixture(scope="module")
def module_database(cluster: ClusterAddress) -> Iterator[Database]:
    """A migrated database that this module's tests share; each must make accounts of its own."""
    with fresh_database(cluster) as found:
        yield found


def _new_run_id() -> str:
    return secrets.token_hex(6)
