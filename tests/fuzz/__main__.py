"""Try mutants for a while: python -m tests.fuzz --minutes 20; ends with 1 where one does what none may do.

Mutants are numbered: ``--from 500`` goes on where another run ended, ``--only bundle:17`` shows one.
"""

from __future__ import annotations

import argparse
import collections
import os
import tempfile
import time
from pathlib import Path

from tests import zoo
from tests.conftest import CONVERTED
from tests.fuzz.kinds import make_kinds
from tests.fuzz.worker import Worker

SHARES = {"bundle": 6, "subnet": 4, "schedule": 3, "pickle": 4, "safetensors": 3, "recipe": 1}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first mutant")
    parser.add_argument("--only", help="KIND or KIND:NUMBER")
    arguments = parser.parse_args()
    only, _, number = (arguments.only or "").partition(":")
    order = [kind for kind, share in SHARES.items() for _ in range(share) if only in ("", kind)]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    worst = {"seconds": (0.0, ""), "megabytes": (0.0, "")}
    faults = 0
    with tempfile.TemporaryDirectory(prefix="dipgo-fuzz-") as name:
        folder = Path(name)
        zoo.ROOT = folder / "zoo"
        os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder), "TMPDIR": str(folder)}
        (folder / "cache" / "dipgo").mkdir(parents=True)
        CONVERTED.mkdir(parents=True, exist_ok=True)
        (folder / "cache" / "dipgo" / "converted").symlink_to(CONVERTED)
        kinds = make_kinds(folder / "seeds")
        end = time.monotonic() + 60 * arguments.minutes
        seed = int(number or arguments.first)
        with Worker(kinds, folder / "scratch") as worker:
            while time.monotonic() < end:
                kind = order[seed % len(order)]
                verdict = worker.judge(kind, seed)
                counts[kind]["ran" if verdict.outcome == "ran" else "refused"] += 1
                for what, best in worst.items():
                    worst[what] = max(best, (getattr(verdict, what), f"{kind}:{seed}"))
                for fault in verdict.faults:
                    faults += 1
                    counts[kind]["faults"] += 1
                    print(f"{kind}:{seed}: {fault}", flush=True)
                if number:
                    print(verdict.outcome)
                    break
                seed += 1
    for kind, count in counts.items():
        print(f"{kind}: {count['ran'] + count['refused']} mutants, {count['ran']} ran, {count['faults']} faults")
    total = sum(count["ran"] + count["refused"] for count in counts.values())
    print(f"{total} mutants, the next is --from {seed}; {faults} faults; most: {worst}")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
