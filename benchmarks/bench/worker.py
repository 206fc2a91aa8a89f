"""Processes that measure one program each: the parent's side (:class:`Worker`), then the child's (:class:`Server`).

The parent decides when each worker runs, so that programs can be timed in turns although each has a process of its
own. The worker times itself: what the pipe takes is not in the samples.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import TypeAdapter

from benchmarks.bench.subjects import ProgramSpec, Spec, Subject, TorchSpec, save, subject_of
from benchmarks.failures import NotMeasuredError, one_line
from dipgo.base.child_process import ChildError, ChildProcess, Parent
from dipgo.base.process_memory import resident_peak

Answer = dict[str, Any]


class Worker(ChildProcess):
    """A process with one program, which prints into ``log`` and may take ``patience`` seconds to answer.

    A context manager that ends it.
    """

    def __init__(self, spec: ProgramSpec | TorchSpec, log: Path, patience: float) -> None:
        super().__init__("benchmarks.bench.worker", log)
        self.spec, self.patience = spec, patience

    def __enter__(self) -> Worker:
        return self

    def load(self) -> Answer:
        """Load the program; see :meth:`Server.do_load`."""
        return self.ask("load", spec=self.spec.model_dump())

    def ask(self, what: str, **arguments: Any) -> Answer:
        """Call a ``do_…`` method of the worker's :class:`Server` and return its answer.

        Raises:
            NotMeasuredError: the worker failed, died, or took longer than it may; the two last end it.
        """
        try:
            self.send({"do": what, **arguments})
            answer: Answer = self.receive(self.patience)
        except ChildError as error:
            raise NotMeasuredError(str(error)) from error
        if "error" in answer:
            raise NotMeasuredError(answer["error"])
        return answer

    @property
    def ended(self) -> bool:
        """Whether the process is no more."""
        return self.returncode is not None


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
        self.subject = subject_of(TypeAdapter(Spec).validate_python(spec))
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
        outputs = run()
        seconds = time.perf_counter() - begin
        self._look_at_memory()
        if scope != "loop":
            return {"seconds": seconds}
        self.last = outputs
        self.first = outputs if self.first is None else self.first
        inside = {name: getattr(self._subject, name) for name in ("device_seconds", "graph_seconds")}
        return {"seconds": seconds, **inside}

    def do_steps(self) -> Answer:
        return {"seconds": self._subject.steps()}

    def do_generate(self, start: int, count: int, seed: int, file: str) -> Answer:
        """Write latents and images of one batch into an npz file."""
        latents, images = self._subject.generate(start, count, seed)
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
        memory = psutil.Process().memory_full_info()
        self.shared_peak = max(self.shared_peak, getattr(memory, "pss", 0))  # Linux alone has it


def _device_memory() -> Answer:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"device_peak": torch.cuda.max_memory_reserved()}


def main() -> None:
    """Answer until there are no more requests: the parent closed the pipe, or died."""
    server, parent = Server(), Parent()
    for request in parent:
        parent.send(server.answer(request))
    if server.subject:
        server.subject.close()


if __name__ == "__main__":
    main()
