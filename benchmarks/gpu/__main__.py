"""Measure the speed of SubNets on a GPU, the most important cases first, within a time limit.

    python -m benchmarks.gpu -o DIR                 all that fits into --seconds
    python -m benchmarks.gpu --resume DIR           go on where the last call ended, or was cut off
    python -m benchmarks.gpu -o DIR --only 'sd-1.5/b1/cuda-graph,sdxl/b1'
    python -m benchmarks.gpu --list                 the cases, in order
    python -m benchmarks.gpu -o DIR --tiny          small configurations, on the CPU too

Writes DIR/report.json, DIR/report.md and DIR/log after every case, so that a cut-off loses nothing.

Imported: torch (2.11 or later), diffusers, transformers, accelerate, safetensors, pydantic, numpy, psutil, tqdm, and
for dipgo's own backends onnx, onnx_ir, onnxscript. Used where it is installed: DeepCache, onnxruntime-gpu, tensorrt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dipgo.base.errors import DipgoError, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("-o", "--output", type=Path, help="a new folder")
    place.add_argument("--resume", type=Path, metavar="DIR", help="a folder of an earlier call")
    parser.add_argument("--only", metavar="PATTERNS", help="starts of case names, * for any characters, with commas")
    parser.add_argument("--seconds", type=float, default=520.0, help="in all (520); a cut-off case runs on --resume")
    parser.add_argument("--case-seconds", type=float, default=150.0, help="after which a case is given up (150)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of a pair (10)")
    parser.add_argument("--pair-seconds", type=float, default=10.0, help="after which a pair of 3 rounds is done (10)")
    parser.add_argument("--tiny", action="store_true", help="small configurations, to try the command")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except DipgoError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, --resume goes on", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    import torch

    from benchmarks.gpu.cases import cases, workloads
    from benchmarks.gpu.run import Options, engines_for, run

    if given.list:
        names = [
            case.name for case in cases(workloads(given.tiny, torch.cuda.is_available()), engines_for(), given.only)
        ]
        print("\n".join(names))
        return 0
    folder = given.output or given.resume
    if folder is None:
        raise UsageError("give -o DIR for a new folder, or --resume DIR for an earlier one")
    if given.repeats < 3 or given.seconds <= 0:
        raise UsageError("give at least 3 --repeats and a positive number of --seconds")
    if not given.tiny and not torch.cuda.is_available():
        raise UsageError("no CUDA device here; --tiny tries the command without one")
    options = Options(
        only=given.only,
        seconds=given.seconds,
        case_seconds=given.case_seconds,
        tiny=given.tiny,
        repeats=given.repeats,
        pair_seconds=given.pair_seconds,
    )
    report = run(folder, options, resume=given.resume is not None)
    print("\n".join(report.headline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
