"""A process that measures one program: started by :mod:`~benchmarks.bench.child`, asked in lines of JSON.

The parent decides when each worker runs, so that programs can be timed in turns although each has a process of its
own. The worker times itself: what the pipe takes is not in the samples.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np
from pydantic import TypeAdapter

from benchmarks.bench.failures import one_line
from benchmarks.bench.inputs import save
from benchmarks.bench.specs import ProgramSpec, Spec, TorchSpec
from benchmarks.bench.subjects import Subject, subject_of
from dipgo.base.process_memory import resident_peak

Answer = dict[str, Any]


class Server:
    """Answers requests about one subject."""

    def __init__(self) -> None:
        self.subject: Subject | None = None
        self.first: np.ndarray | None = None
        self.last: np.ndarray | None = None
        self.shared_peak = 0

    def answer(self, request: dict[str, Any]) -> Answer:
        """Do what is asked for; an error becomes an answer, and the worker lives on."""
        try:
            return getattr(self, f"do_{request.pop('do')}")(**request)
        except Exception as error:  # a program may fail in any way; the parent lists it
            return {"error": one_line(error)}

    def do_load(self, spec: dict[str, Any]) -> Answer:
        """Load the subject; seconds from the request until it is ready."""
        begin = time.perf_counter()
        chosen: ProgramSpec | TorchSpec = TypeAdapter(Spec).validate_python(spec)
        self.subject = subject_of(chosen)
        return {"seconds": time.perf_counter() - begin, "label": self.subject.label, "batch": self.subject.batch}

    def do_warm_up(self, rounds: int) -> Answer:
        """Run the loop; seconds of the first run, in which a compiler may work."""
        begin = time.perf_counter()
        self.first = self.last = self._subject.loop()
        seconds = time.perf_counter() - begin
        for _ in range(rounds - 1):
            self._subject.loop()
        return {"seconds": seconds}

    def do_sample(self, scope: str, prepared: bool) -> Answer:
        """Time one run; ``prepared`` by an untimed one: steady use, not how well it finds the caches others left."""
        run: Callable[[], np.ndarray] = getattr(self._subject, scope)
        if prepared:
            run()
        gc.collect()
        gc.disable()  # keep Python's garbage collector out of the samples, as timeit does
        begin = time.perf_counter()
        made = run()
        seconds = time.perf_counter() - begin
        self._look_at_memory()
        if scope != "loop":
            return {"seconds": seconds}
        self.last = made
        self.first = made if self.first is None else self.first
        inside = {name: getattr(self._subject, name) for name in ("device_seconds", "graph_seconds")}
        return {"seconds": seconds, **inside}

    def do_steps(self) -> Answer:
        return {"seconds": self._subject.steps()}

    def do_made(self, start: int, count: int, seed: int, file: str) -> Answer:
        """Write latents and images of one batch into an npz file."""
        latents, images = self._subject.made(start, count, seed)
        save(file, {"latents": latents} | ({} if images is None else {"images": images}))
        return {}

    def do_latents(self, file: str) -> Answer:
        """Write the final latents of the first and of the last run of the loop, which had the same noise."""
        assert self.first is not None and self.last is not None, "a loop comes first"  # noqa: PT018 - for mypy
        save(file, {"first": self.first, "last": self.last})
        return {}

    def do_macs(self) -> Answer:
        return {"macs": self._subject.macs()}

    def do_memory(self) -> Answer:
        """Bytes: the peak of what was resident, and the largest share of it seen (shared pages divided by sharers)."""
        self._look_at_memory()
        return {"resident_peak": resident_peak(), "proportional_peak": self.shared_peak, **_device_memory()}

    @property
    def _subject(self) -> Subject:
        assert self.subject is not None, "load comes first"
        return self.subject

    def _look_at_memory(self) -> None:
        self.shared_peak = max(self.shared_peak, _proportional())


def _proportional() -> int:
    try:
        with open("/proc/self/smaps_rollup") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    except OSError:
        return 0


def _device_memory() -> Answer:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"device_peak": torch.cuda.max_memory_reserved()}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer until there are no more requests: the parent closed the pipe, or died."""
    server = Server()
    for line in requests:
        answers.write(json.dumps(server.answer(json.loads(line))) + "\n")
        answers.flush()
    if server.subject:
        server.subject.close()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
