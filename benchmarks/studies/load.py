"""A load test of a served bundle with Triton's own client: is anything lost, are refusals explicit, is memory flat?

python -m benchmarks.studies.load build/demo/bundle -o benchmarks/results/load-digits-dit.json

First as many clients as keep the server busy send their requests one after the other; then more clients than the
queue holds do. Every image is compared with the first one of its class and seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil

from benchmarks.studies.study import Study, StudyRecord, Words, run
from dipgo.base.child_process import python_environment
from dipgo.base.errors import DipgoError
from dipgo.base.records import Record
from engines.serving.limits import Limits
from engines.serving.repository import Deployment, write_repository
from engines.sizes import batch_of
from export.bundle import open_bundle

NAME = "model"
PAIRS = 20  # of class and seed, so that images can be compared


class Phase(Record):
    """What came of requests of one image each; latencies are of those that were served."""

    clients: int
    queue: int
    requests: int
    served: int
    refused: dict[str, int]
    lost: int
    wrong_images: int
    seconds: float
    images_per_s: float
    latency_ms: dict[str, float]


class LoadRecord(StudyRecord):
    """The result file; memory is the resident set in bytes by process, by requests served before."""

    server: str
    model: str
    steps: int
    batch: int
    saturation: Phase
    overload: Phase
    memory: dict[str, dict[str, int]]


class Clients:
    """Clients in threads, each with a connection of its own; ``requests`` of them in all.

    ``at`` is called with the number of requests served so far, when it is one of ``marks``.
    """

    def __init__(
        self, port: int, labels: Sequence[str], requests: int, marks: Sequence[int], at: Callable[[int], None]
    ) -> None:
        self.port, self.labels, self.marks, self.at = port, labels, marks, at
        self._numbers, self._requests = count(), requests
        self._lock = threading.Lock()
        self._first: dict[int, np.ndarray] = {}
        self.latencies: list[float] = []
        self.refused: Counter[str] = Counter()
        self.wrong = 0

    def run(self, clients: int) -> float:
        """Send all requests; returns the seconds that it took."""
        started = time.perf_counter()
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started

    def _client(self) -> None:
        import tritonclient.http as triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
        from tritonclient.utils import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
            InferenceServerException,
        )

        with triton.InferenceServerClient(f"127.0.0.1:{self.port}", network_timeout=300) as client:
            while (number := next(self._numbers)) < self._requests:
                pair = number % PAIRS
                label = triton.InferInput("class", [1, 1], "BYTES")
                label.set_data_from_numpy(np.array([[self.labels[pair % len(self.labels)].encode()]], np.object_))
                seed = triton.InferInput("seed", [1, 1], "INT64")
                seed.set_data_from_numpy(np.array([[pair]], np.int64))
                started = time.perf_counter()
                try:
                    answer = client.infer(NAME, [label, seed], outputs=[triton.InferRequestedOutput("image")])
                    self._served(pair, answer.as_numpy("image"), time.perf_counter() - started)
                except InferenceServerException as error:
                    with self._lock:
                        self.refused[f"{error.status()} {error.message().split('] ')[-1]}"] += 1
                except Exception:  # no answer at all: neither served nor refused
                    continue

    def _served(self, pair: int, image: np.ndarray, seconds: float) -> None:
        with self._lock:
            self.latencies.append(seconds)
            self.wrong += not np.array_equal(self._first.setdefault(pair, image), image)
            if len(self.latencies) in self.marks:
                self.at(len(self.latencies))


def phase(sent: Clients, clients: int, queue: int, requests: int) -> Phase:
    """Send requests and describe what came of them."""
    seconds = sent.run(clients)
    latencies = np.array(sent.latencies or [np.nan]) * 1e3
    return Phase(
        clients=clients,
        queue=queue,
        requests=requests,
        served=len(sent.latencies),
        refused=dict(sent.refused),
        lost=requests - len(sent.latencies) - sent.refused.total(),
        wrong_images=sent.wrong,
        seconds=round(seconds, 2),
        images_per_s=round(len(sent.latencies) / seconds, 2),
        latency_ms={f"p{q}": round(float(np.percentile(latencies, q)), 1) for q in (50, 95, 99)},
    )


@contextmanager
def served(repository: Path, server: Path | None) -> Iterator[tuple[int, psutil.Process]]:
    """Serve a repository in a process of its own; yields the HTTP port and the process."""
    command = [sys.executable, "-m", "engines.serving", str(repository), "--host", "127.0.0.1", "--http-port", "0"]
    command += ["--metrics-port", "0"] + (["--server", str(server)] if server else [])
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=python_environment(), stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("ready"):
                process.wait(60)
                log.seek(0)
                raise DipgoError((log.read().strip().splitlines() or ["the server did not start"])[-1])
            yield int(line.split(",")[0].rsplit(":", 1)[1]), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(120)


def memory(process: psutil.Process) -> dict[str, int]:
    """Return the resident sets of the gate, of Triton and of its models, in bytes."""
    (triton,) = process.children()
    return {
        "gate": process.memory_info().rss,
        "triton": triton.memory_info().rss,
        "model": sum(child.memory_info().rss for child in triton.children()),
    }


def version_of(port: int) -> str:
    """Return the server's name and version, as it gives them."""
    with urlopen(f"http://127.0.0.1:{port}/v2") as answer:
        metadata = json.load(answer)
    return f"{metadata['name']} {metadata['version']}"


def measure(bundle: Path, server: Path | None, clients: int, requests: int) -> dict[str, Any]:
    """Serve a class bundle and load it; returns the record's figures."""
    record = open_bundle(bundle).record
    if record.conditioning.kind != "class":
        raise DipgoError(
            f"{bundle}: conditioned by {record.conditioning.kind}; the load test is for bundles of classes"
        )
    labels = list(record.conditioning.labels) or ["0"]
    limits = Limits()
    with tempfile.TemporaryDirectory(prefix="dipgo-load-") as folder:
        write_repository(bundle, Path(folder), Deployment(name=NAME, link=True, limits=limits))
        with served(Path(folder), server) as (port, process):
            version = version_of(port)
            marks = {"after 0": memory(process)}

            def mark(number: int) -> None:
                marks[f"after {number}"] = memory(process)

            saturation = phase(Clients(port, labels, requests, (100, requests), mark), clients, limits.queue, requests)
            many = 6 * limits.queue
            overload = phase(Clients(port, labels, many, (), mark), 3 * limits.queue, limits.queue, many)
            marks["after the overload"] = memory(process)
    return {
        "server": version,
        "model": record.model.name,
        "steps": len(record.steps),
        "batch": batch_of(record),
        "saturation": saturation,
        "overload": overload,
        "memory": marks,
    }


def main(words: Words | None = None) -> None:
    study = Study("load", __doc__, words)
    study.parser.add_argument("bundle", type=Path)
    study.parser.add_argument("--server", type=Path, help="tritonserver, or a folder that holds it")
    study.parser.add_argument("--clients", type=int, default=4)
    study.parser.add_argument("--requests", type=int, default=1000)
    options = study.options()
    record = LoadRecord(**measure(options.bundle, options.server, options.clients, options.requests), **study.origin())
    study.write(record)
    print(record.text())


if __name__ == "__main__":
    run(main)
