"""SIGKILL while outputs are written: what is there is whole, the same command works again, and drafts go in time."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.bench.report import REPORT, read_report
from dipgo.schedule.subnet import save_subnet
from export.bundle import open_bundle
from tests import zoo
from tests.models import random_subnet

KILLS = 10
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def subnet(tmp_path_factory):
    file = tmp_path_factory.mktemp("kills") / "subnet.json"
    save_subnet(random_subnet(zoo.trace("dit"), zoo.sampler("dit", 4), seed=0), file)
    return file


def draft_of(output):
    return next(iter(output.parent.glob(f".{output.name}.dipgo-*")), None)


def started(command, output):
    """Start a Python program and wait until it writes; returns it and when that began."""
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and draft_of(output) is None:
        time.sleep(0.001)
    return process, time.monotonic()


def check_kills(command, output, whole):
    """Kill a command at random points of its writing; ``whole`` raises where an output is not."""
    process, begun = started(command, output)
    while process.poll() is None and not output.exists():
        time.sleep(0.001)
    writing = time.monotonic() - begun
    assert process.wait() == 0, process.stderr.read()
    whole(output)
    shutil.rmtree(output)
    generator, cut_short = random.Random(0), 0
    for _ in range(KILLS):
        process, _ = started(command, output)
        time.sleep(generator.uniform(0, writing))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            whole(output)
            shutil.rmtree(output)
        else:
            cut_short += 1
    assert cut_short >= KILLS // 3
    drafts = list(output.parent.glob(".*.dipgo-*"))
    assert drafts
    for draft in drafts:
        os.utime(draft, (0, time.time() - 90_000))
    process, _ = started(command, output)
    assert process.wait() == 0, process.stderr.read()
    whole(output)
    assert not list(output.parent.glob(".*.dipgo-*"))


def test_export(subnet, tmp_path):
    check_kills(["-m", "dipgo", "export", subnet, "-o", tmp_path / "bundle"], tmp_path / "bundle", open_bundle)


def test_report(tmp_path):
    """The report of a bench, made of a committed record and of pictures that take a while to write."""
    code = """
import sys
from pathlib import Path
import numpy as np
from benchmarks.bench.page import write_report
from benchmarks.bench.report import read_report
report = read_report(Path(sys.argv[1]))
pictures = np.random.default_rng(0).random((4, 512, 512, 3))
write_report(report, {row.name: pictures for row in report.rows}, ["a"] * 4, Path(sys.argv[2]))
"""
    record = Path(__file__).parents[1] / "benchmarks" / "results" / "emoji-sd-50-0.2.json"

    def whole(report):
        read_report(report / REPORT.known_by)
        assert all((report / name).read_bytes() for name in REPORT.files(report))

    check_kills(["-c", code, record, tmp_path / "report"], tmp_path / "report", whole)
