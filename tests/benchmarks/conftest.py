"""One compiled bundle and one report on it, for all tests of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from benchmarks.bench.baselines import BASELINES
from benchmarks.bench.bench import bench
from benchmarks.bench.config import BenchConfig
from benchmarks.bench.report import ReportRecord
from benchmarks.bench.suite import Suite
from dipgo.base.progress import silent
from dipgo.searching.task import Task
from tests import zoo
from tests.models import random_subnet


@pytest.fixture(scope="session")
def task() -> Task:
    return zoo.task("dit", 8)


@pytest.fixture(scope="session")
def bundle(task: Task) -> Path:
    """Eight steps, half of the gates off, backups of two outputs weighted by channel; not to be changed."""
    subnet = random_subnet(task.trace, task.sampler, seed=3, keep=0.5, terms=2, channels=2)
    return zoo.bundle(zoo.trace("dit", open_guidance=True), task.sampler, subnet)


def crash(task: Task, ratio: float) -> NoReturn:
    """A baseline that fails."""
    raise RuntimeError("out of\nluck <b>")


@pytest.fixture(scope="session")
def measured(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportRecord, Path]:
    """A report on the bundle, one of whose baselines crashes, and its folder."""
    folder = tmp_path_factory.mktemp("reports") / "report"
    baselines = {**BASELINES, "crash": crash}
    settings = Suite(about="small", images=9, repeats=4, seconds=0, threads=1, processes=2, patience=60)
    settings = settings.changed(scopes=["loop", "pipeline", "step"])
    report = bench(bundle, folder, BenchConfig(suite=settings), progress=silent, baselines=baselines)
    return report, folder
