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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Answer:
    """What came of one request: the image of a pair of class and seed, a refusal, or neither where it was lost."""

    pair: int
    seconds: float
    image: bytes | None = None
    refusal: str | None = None


def ask(client: Any, label: str, pair: int) -> Answer:
    """Ask for one image."""
    import tritonclient.http as triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from tritonclient.utils import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
        InferenceServerException,
    )

    subject, seed = triton.InferInput("class", [1, 1], "BYTES"), triton.InferInput("seed", [1, 1], "INT64")
    subject.set_data_from_numpy(np.array([[label.encode()]], np.object_))
    seed.set_data_from_numpy(np.array([[pair]], np.int64))
    image = refusal = None
    started = time.perf_counter()
    try:
        answer = client.infer(NAME, [subject, seed], outputs=[triton.InferRequestedOutput("image")])
        image = answer.as_numpy("image").tobytes()
    except InferenceServerException as error:
        refusal = f"{error.status()} {error.message().split('] ')[-1]}"
    except Exception:  # no answer at all
        refusal = None
    return Answer(pair, time.perf_counter() - started, image, refusal)


def answers(port: int, labels: Sequence[str], requests: range, clients: int) -> list[Answer]:
    """Send requests by clients in threads, each with a connection of its own, one request after the other."""
    import tritonclient.http as triton

    own = threading.local()

    def connect() -> None:
        own.client = triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=300)

    def send(number: int) -> Answer:
        pair = number % PAIRS
        return ask(own.client, labels[pair % len(labels)], pair)

    with ThreadPoolExecutor(clients, initializer=connect) as pool:
        return list(pool.map(send, requests))


def phase(sent: Sequence[Answer], seconds: float, clients: int, queue: int) -> Phase:
    """Describe what came of requests."""
    served = [answer for answer in sent if answer.image is not None]
    refused = Counter(answer.refusal for answer in sent if answer.refusal)
    first = {answer.pair: answer.image for answer in reversed(served)}
    latencies = np.array([answer.seconds for answer in served] or [np.nan]) * 1e3
    return Phase(
        clients=clients,
        queue=queue,
        requests=len(sent),
        served=len(served),
        refused=dict(refused),
        lost=len(sent) - len(served) - refused.total(),
        wrong_images=sum(answer.image != first[answer.pair] for answer in served),
        seconds=round(seconds, 2),
        images_per_s=round(len(served) / seconds, 2),
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
            marks, sent, seconds = {"after 0": memory(process)}, [], 0.0
            for part in (range(min(100, requests)), range(min(100, requests), requests)):
                started = time.perf_counter()
                sent += answers(port, labels, part, clients)
                seconds += time.perf_counter() - started
                marks[f"after {part.stop}"] = memory(process)
            saturation = phase(sent, seconds, clients, limits.queue)
            many, started = 3 * limits.queue, time.perf_counter()
            sent = answers(port, labels, range(2 * many), many)
            overload = phase(sent, time.perf_counter() - started, many, limits.queue)
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
