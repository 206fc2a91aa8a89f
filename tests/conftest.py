"""What every test needs: one thread, a cache apart from the user's, and the zoo of small models."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dipgo.graph.trace import Trace
from dipgo.searching.task import Task
from tests import zoo

# For the processes that tests start: two of them whose threads wait for each other on two cores take minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


CONVERTED = Path(__file__).parents[1] / "build" / "test-conversions"
LONGEST = [  # first, so that both workers end at about the same time
    "export/test_parity.py",
    "benchmarks/test_parity_of_prompts.py",
    "export/test_precision.py",
    "export/test_dynamic.py",
    "test_cli.py",
    "dipgo/test_optimise.py",
    "benchmarks/test_bench.py",
    "dipgo/test_published.py",
    "dipgo/test_sweep.py",
    "export/test_components.py",
    "engines/test_attach.py",
    "engines/test_torch_runner.py",
    "dipgo/test_families.py",
]


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file on one worker, and all tests of the one long report."""

    def file_of(item: pytest.Item) -> str:
        return item.path.relative_to(Path(__file__).parent).as_posix()

    def place(item: pytest.Item) -> int:
        return LONGEST.index(file_of(item)) if file_of(item) in LONGEST else len(LONGEST)

    for item in items:
        reads_the_report = "measured" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("report" if reads_the_report else file_of(item)))
    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let all workers of the session share one zoo, and one cache in the place of the user's."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    zoo.ROOT = root / "zoo"
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    converted = root / "cache" / "dipgo" / "converted"  # by content: a session may have what the last one converted
    converted.parent.mkdir(parents=True, exist_ok=True)
    CONVERTED.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another worker was first
        converted.symlink_to(CONVERTED)
    os.environ["MPLCONFIGDIR"] = str(root / "matplotlib")  # else each cache of a test's own takes a list of fonts


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On models as small as these, threads cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def task(request: pytest.FixtureRequest) -> Task:
    """A search's task on the tiny DiT, of as many steps as the module says in ``STEPS``."""
    return zoo.task("dit", request.module.STEPS)


@pytest.fixture(scope="session")
def blocks() -> Trace:
    """A UNet's blocks, without guidance."""
    return zoo.trace("sd", "block", 1.0)


@pytest.fixture(scope="session")
def tiny_dit() -> str:
    """A DiTPipeline folder with random weights, see :func:`tests.models.tiny_dit`; not to be changed."""
    return zoo.pipeline("dit")
