"""Whether the tests see small faults: put one at a time into a copy of the code, and run them until one fails.

    python -m tests.mutate                            all of tests/faults.yaml, on two processes
    python -m tests.mutate slot-freed-early -o FILE   some of them, with the outcomes as JSON

A fault is caught where a test of ``make test`` fails. The tests named beside it run first, then the others of their
folder, then the rest, so that a fault that is caught takes a minute and one that survives takes as long as the suite.
The working tree is never touched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_name("faults.yaml")
LIMIT = 2400  # seconds for the tests of one fault; one that hangs them is caught, too
OPTIONS = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=no", "-rfE"]


@dataclass(frozen=True)
class Fault:
    """A fault: the text ``before``, which stands once in a file, becomes ``after``; ``tests`` run first."""

    name: str
    file: str
    before: str
    after: str
    tests: Sequence[str]


def read_faults(names: Sequence[str] = ()) -> list[Fault]:
    """Return the faults of these names, or all.

    Raises:
        SystemExit: a name that is unknown, or a fault whose text the code no longer holds once.
    """
    faults = [Fault(**entry) for entry in yaml.safe_load(FAULTS.read_text())]
    unknown = set(names) - {fault.name for fault in faults}
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: no fault of {FAULTS.name}")
    for fault in faults:
        count = (ROOT / fault.file).read_text().count(fault.before)
        if count != 1 or fault.before == fault.after:
            raise SystemExit(f"fault '{fault.name}': its text stands {count} times in {fault.file}; mend {FAULTS.name}")
    return [fault for fault in faults if not names or fault.name in names]


def copy_tree(folder: Path) -> Path:
    """Copy what git knows or would add."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def try_fault(fault: Fault, tree: Path, rounds: int) -> dict[str, Any]:
    """Run the tests on a tree with the fault in it, and mend the tree again; returns which test failed first."""
    begun, path = time.monotonic(), tree / fault.file
    whole = path.read_text()
    path.write_text(whole.replace(fault.before, fault.after))
    folders = sorted({str(Path(test.partition("::")[0]).parent) for test in fault.tests})
    try:
        caught = None
        for selection in [fault.tests, folders, ["tests"]][:rounds]:
            caught = caught or first_failure(tree, selection)
    finally:
        path.write_text(whole)
    return {"fault": fault.name, "caught_by": caught, "seconds": round(time.monotonic() - begun, 1)}


def first_failure(tree: Path, selection: Sequence[str]) -> str | None:
    """Return the first test of the fast tier that fails in a tree, None where none does."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *selection]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options: dict[str, Any] = {"cwd": tree, "env": environment, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, timeout=LIMIT, check=False, **options)
    except subprocess.TimeoutExpired:
        return "a test that never ends"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    failed = failed or ([f"pytest ended with {done.returncode}"] if done.returncode else [])
    return failed[0].split(" - ")[0] if failed else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="FAULT", help="which; all by default")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="trees at a time")
    parser.add_argument("--rounds", type=int, default=3, help="1: a fault's own tests; 2: their folder; 3: all")
    parser.add_argument("-o", "--output", type=Path, help="where the outcomes go, as JSON; rewritten as they come")
    options = parser.parse_args()
    outcomes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        trees: Queue[Path] = Queue()
        for number in range(options.jobs):
            trees.put(copy_tree(Path(folder) / str(number)))

        def run(fault: Fault) -> dict[str, Any]:
            tree = trees.get()
            try:
                return try_fault(fault, tree, options.rounds)
            finally:
                trees.put(tree)

        for outcome in pool.map(run, read_faults(options.names)):
            print("{fault}: {caught_by} ({seconds:.0f} s)".format_map(outcome), flush=True)
            outcomes.append(outcome)
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(outcomes, indent=2) + "\n")
    survivors = [outcome["fault"] for outcome in outcomes if outcome["caught_by"] is None]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} caught; survive: {', '.join(survivors) or 'none'}")


if __name__ == "__main__":
    main()
