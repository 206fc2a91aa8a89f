"""What do others notice while somebody attacks a served bundle? Latencies, refusals, losses and memory by attack.

python -m benchmarks.studies.attacks build/demo/bundle -o benchmarks/results/attacks-digits-dit.json

One client asks for an image after the other, each over a connection of its own, while another process attacks from
another address, 127.0.0.2. The server has 1,024 file descriptors. With --nginx the real nginx stands before it, with
the configuration that is shipped.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import resource
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from benchmarks.studies.load import NAME, PAIRS, Answer, Phase, ask, labels_of, memory, phase, served, version_of
from benchmarks.studies.study import Study, StudyRecord, Words, run
from dipgo.base.errors import DipgoError
from dipgo.base.records import Record
from engines.serving.repository import Deployment, write_repository
from engines.serving.triton import free_port

DESCRIPTORS = 1024
NGINX = Path(__file__).parents[2] / "engines" / "serving" / "deploy" / "nginx.conf"
HEAD = f"POST /v2/models/{NAME}/infer HTTP/1.1\r\nHost: a\r\n".encode()
WORK = {
    "inputs": [
        {"name": "class", "datatype": "BYTES", "shape": [1, 1], "data": ["0"]},
        {"name": "number", "datatype": "INT32", "shape": [1, 1], "data": [16]},
    ]
}


class Others(Record):
    """What others had of the server meanwhile; memory is the resident set in bytes, afterwards."""

    ready: int
    requests: int
    served: int
    refused: int
    lost: int
    wrong_images: int
    p50_ms: float | None
    p99_ms: float | None
    gate_bytes: int
    triton_bytes: int
    model_bytes: int


class AttackRecord(StudyRecord):
    """The result file, by attack; ready is the status of the server's readiness in the midst of it."""

    server: str
    front: str
    seconds: float
    others: dict[str, Others]


def request_of(body: bytes) -> bytes:
    """Return a whole request."""
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def hold(port: int, content: bytes, more: bytes = b"", seconds: float = 3600.0) -> None:
    """Connect, send, and hold on, a little ``more`` every second; once closed, do it again a second later."""
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
            try:
                writer.write(content)
                end = time.monotonic() + seconds
                while time.monotonic() < end and not (reader.at_eof() or reader.exception()):
                    await asyncio.sleep(min(1.0, seconds))
                    writer.write(more)
            finally:
                writer.transport.abort()
        await asyncio.sleep(1.0)


ATTACKS: dict[str, tuple[int, Callable[[int], Awaitable[None]]]] = {
    "headers that never end": (1017, lambda port: hold(port, HEAD)),
    "headers of a byte per second": (1017, lambda port: hold(port, HEAD + b"X-Y: ", b"z")),
    "bodies of one byte": (257, lambda port: hold(port, HEAD + b"Content-Length: 500\r\n\r\n{")),
    "bodies of a byte per second": (257, lambda port: hold(port, HEAD + b"Content-Length: 500\r\n\r\n{", b" ")),
    "clients that leave after 50 ms": (
        64,
        lambda port: hold(port, request_of(json.dumps(WORK).encode()), seconds=0.05),
    ),
    "a megabyte of brackets": (8, lambda port: hold(port, request_of(b"[" * 999_000), seconds=0.5)),
    "connections that say nothing": (256, lambda port: hold(port, b"", seconds=0.2)),
}


def attack(name: str, port: int) -> None:
    """Attack a server of this machine for ever."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    clients, one = ATTACKS[name]

    async def all_of_them() -> None:
        await asyncio.gather(*(one(port) for _ in range(clients)))

    asyncio.run(all_of_them())


@contextmanager
def attacking(name: str, port: int) -> Iterator[None]:
    """Attack from another process within the context."""
    process = multiprocessing.get_context("spawn").Process(target=attack, args=(name, port), daemon=True)
    process.start()
    try:
        time.sleep(5)  # until it has begun
        yield
    finally:
        process.kill()
        process.join()


@contextmanager
def stopping(process: psutil.Process) -> Iterator[None]:
    """Stop a process within the context."""
    process.suspend()
    try:
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        yield
    finally:
        process.resume()


@contextmanager
def nginx(behind: int) -> Iterator[int]:
    """Run the real nginx before a port of this machine, with the configuration that is shipped; yields its port.

    Raises:
        DipgoError: it does not start.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dipgo-nginx-") as folder:
        Path(folder).chmod(0o755)  # for its workers, who are not root
        text = NGINX.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{behind}")
        (Path(folder) / "nginx.conf").write_text(text.replace("127.0.0.1:8080", f"127.0.0.1:{port}"))
        command = ["nginx", "-p", folder, "-c", f"{folder}/nginx.conf", "-g", "daemon off;"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            for _ in range(100):
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/v2"):
                    break
                if process.poll() is not None:
                    assert process.stderr is not None
                    raise DipgoError(f"nginx: {process.stderr.read().strip().splitlines()[-1]}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait(30)


def ready(port: int) -> int:
    """Return the status of the server's readiness; 0 where it does not answer."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=10) as answer:
            return int(answer.status)
    except OSError as error:
        return int(getattr(error, "code", 0))


def answers_for(seconds: float, port: int, labels: Sequence[str]) -> list[Answer]:
    """Send one request after the other, each over a connection of its own."""
    import tritonclient.http as triton  # type: ignore[import-untyped, import-not-found, unused-ignore]

    sent: list[Answer] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pair = len(sent) % PAIRS
        with triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=300) as client:
            sent.append(ask(client, labels[pair % len(labels)], pair))
        if sent[-1].refusal:
            time.sleep(0.1)  # as one who is told to come again
    return sent


def measure(bundle: Path, server: Path | None, front: bool, seconds: float) -> dict[str, Any]:
    """Serve a class bundle and attack it in all ways; returns the record's figures."""
    labels, deployment = labels_of(bundle), Deployment(name=NAME, link=True)
    with tempfile.TemporaryDirectory(prefix="dipgo-attacks-") as folder:
        write_repository(bundle, Path(folder), deployment)
        with (
            served(Path(folder), server, DESCRIPTORS) as (behind, process),
            nginx(behind) if front else nullcontext(behind) as port,
        ):
            (model,) = process.children()[0].children()
            attacks: dict[str, AbstractContextManager[None]] = {"nobody": nullcontext()}
            attacks |= {name: attacking(name, port) for name in ATTACKS}
            attacks |= {"a stopped model": stopping(model), "nobody any more": nullcontext()}
            others = {}
            for name, context in attacks.items():
                with context:
                    status = ready(port)
                    sent = answers_for(seconds, port, labels)
                result = phase(sent, seconds, 1, deployment.limits.queue)
                others[name] = others_of(result, status, memory(process))
            version = version_of(port)
    return {"server": version, "front": "nginx" if front else "none", "seconds": seconds, "others": others}


def others_of(result: Phase, status: int, resident: dict[str, int]) -> Others:
    """Return a line of the table."""
    return Others(
        ready=status,
        requests=result.requests,
        served=result.served,
        refused=sum(result.refused.values()),
        lost=result.lost,
        wrong_images=result.wrong_images,
        p50_ms=result.latency_ms["p50"] if result.served else None,
        p99_ms=result.latency_ms["p99"] if result.served else None,
        **{f"{name}_bytes": size for name, size in resident.items()},
    )


def main(words: Words | None = None) -> None:
    study = Study("attacks", __doc__, words)
    study.parser.add_argument("bundle", type=Path)
    study.parser.add_argument("--server", type=Path, help="tritonserver, or a folder that holds it")
    study.parser.add_argument("--nginx", action="store_true", help="the real nginx before it")
    study.parser.add_argument("--seconds", type=float, default=60.0, help="of each attack")
    options = study.options()
    record = AttackRecord(**measure(options.bundle, options.server, options.nginx, options.seconds), **study.origin())
    study.write(record)
    print(record.text())


if __name__ == "__main__":
    run(main)
