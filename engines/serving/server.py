"""Run Triton on a model repository behind the gate, from the first model loaded to the last request answered."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from aiohttp import ClientError, ClientSession, web

from dipgo.base.errors import DipgoError
from engines.serving.gate import BODY_BYTES, Gate
from engines.serving.install import Install, prepare_backends

MARKED = re.compile(r"E\d{4} [^\]]*\] (.*)")
ADMINISTRATION = "shared-memory,model-repository,trace,logging"


@dataclass(frozen=True)
class Addresses:
    """Where the server listens; port 0 takes any that is free, None is not served.

    Triton's gRPC port is its own: no gate stands before it, so keep it inside a network that you trust.
    """

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int | None = None
    metrics: int | None = 8002


@dataclass(frozen=True)
class Times:
    """Seconds until the models must be ready, and seconds that requests have to finish on the way out."""

    start_s: float = 600.0
    drain_s: float = 60.0


def serve(
    repository: Path,
    install: Install,
    addresses: Addresses,
    started: Callable[[str], None],
    times: Times | None = None,
    body_bytes: int = BODY_BYTES,
) -> None:
    """Serve a model repository until SIGTERM or SIGINT; requests under way are then finished, new ones refused.

    Args:
        repository: what :func:`engines.serving.repository.write_repository` wrote.
        install: the server.
        addresses: where to listen.
        started: called with a line that says where, once all models are loaded and warm.
        times: how long to wait.
        body_bytes: the largest body over HTTP.

    Raises:
        DipgoError: a port is in use, a model does not load, or the server or a model's process ends by itself.
    """
    times = times or Times()
    token = secrets.token_hex(16)
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryDirectory(prefix="dipgo-serve-") as scratch:
        backends, environment = prepare_backends(install, Path(scratch))
        behind = _free_port()
        command = [
            str(install.binary),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name=dipgo-{token}-",
            "--disable-auto-complete-config",
            "--http-address=127.0.0.1",
            f"--http-port={behind}",
            "--log-info=false",
            "--pinned-memory-pool-byte-size=0",
            f"--exit-timeout-secs={round(times.drain_s)}",
            *_ports(addresses, token),
        ]
        gate = Gate(f"http://127.0.0.1:{behind}", body_bytes)
        try:
            asyncio.run(_run(command, environment, addresses, gate, started, times))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for left in Path("/dev/shm").glob(f"dipgo-{token}-*"):  # by a model's process that was killed
                left.unlink(missing_ok=True)


def _ports(addresses: Addresses, token: str) -> Iterator[str]:
    if addresses.grpc is None:
        yield "--allow-grpc=false"
    else:
        yield f"--grpc-address={addresses.host}"
        yield f"--grpc-port={addresses.grpc}"
        yield f"--grpc-restricted-protocol={ADMINISTRATION}:closed={token}"  # a key that nobody has
    if addresses.metrics is None:
        yield "--allow-metrics=false"
    else:
        yield f"--metrics-address={addresses.host}"
        yield f"--metrics-port={addresses.metrics}"


async def _run(
    command: list[str],
    environment: dict[str, str],
    addresses: Addresses,
    gate: Gate,
    started: Callable[[str], None],
    times: Times,
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # The gate closes first: on its way out Triton waits for connections that are open.
    async with _triton(command, environment, times) as (triton, reason), _gate(gate) as runner:
        stopped = asyncio.create_task(stop.wait())
        ended = asyncio.create_task(triton.wait())
        ready = asyncio.create_task(_ready(gate.behind))
        await asyncio.wait({stopped, ended, ready}, timeout=times.start_s, return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and not stopped.done():
            await _listen(runner, addresses)
            started(f"ready: {_address(runner)}, Ctrl-C ends it")
            lost = asyncio.create_task(_lost(triton.pid))
            await asyncio.wait({stopped, ended, lost}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done() and not stopped.done():
                triton.kill()  # it would wait for the process that is gone
                raise DipgoError("a model's process ended by itself (out of memory?); start the server again")
        if ended.done() and not stopped.done():
            raise DipgoError(f"Triton ended by itself, code {triton.returncode}: {await reason()}")
        if not stopped.done():
            raise DipgoError(f"Triton was not ready within {times.start_s:g} s; its log says why")
        await gate.drained(times.drain_s)


@contextlib.asynccontextmanager
async def _gate(gate: Gate) -> AsyncIterator[web.AppRunner]:
    runner = web.AppRunner(gate.application(), access_log=None, auto_decompress=False, shutdown_timeout=5.0)
    await runner.setup()
    try:
        yield runner
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, addresses: Addresses) -> None:
    try:
        await web.TCPSite(runner, addresses.host, addresses.http).start()
    except OSError as error:
        place = f"{addresses.host}:{addresses.http}"
        raise DipgoError(f"{place}: cannot be listened on ({error.strerror}); give another --http-port") from error


@contextlib.asynccontextmanager
async def _triton(
    command: list[str], environment: dict[str, str], times: Times
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Callable[[], Awaitable[str]]]]:
    """Start Triton and end it: asked first, then made to. Yields it, and what tells why it ended."""
    try:
        # In a session of its own: Ctrl-C in a terminal reaches this process alone, which lets requests finish first.
        triton = await asyncio.create_subprocess_exec(
            *command, env=environment, start_new_session=True, stderr=asyncio.subprocess.PIPE, limit=2**20
        )
    except OSError as error:
        raise DipgoError(f"{command[0]}: cannot be started ({error.strerror}); give another --server") from error
    lines: deque[str] = deque(maxlen=200)
    reader = asyncio.create_task(_pass_on(triton.stderr, lines))

    async def reason() -> str:
        await reader
        return _reason(lines)

    try:
        yield triton, reason
    finally:
        if triton.returncode is None:
            triton.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(triton.wait(), times.drain_s + 10)
            except TimeoutError:
                triton.kill()
                await triton.wait()
        await reader


async def _lost(pid: int) -> None:
    """Wait until a model's process is gone: Triton goes on without it, says that it is ready, and answers 500."""
    models = psutil.Process(pid).children()
    while all(model.is_running() and model.status() != psutil.STATUS_ZOMBIE for model in models):
        await asyncio.sleep(0.5)


async def _ready(address: str) -> None:
    async with ClientSession() as client:
        while True:
            with contextlib.suppress(ClientError):
                async with client.get(f"{address}/v2/health/ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


async def _pass_on(stream: asyncio.StreamReader | None, lines: deque[str]) -> None:
    assert stream is not None
    async for line in stream:
        lines.append(line.decode(errors="replace").rstrip())
        print(lines[-1], file=sys.stderr, flush=True)


def _reason(lines: deque[str]) -> str:
    """Return the error in a log that says most: the last with Triton's mark, without time and place."""
    errors = [found[1] for line in lines if (found := MARKED.match(line))]
    return " ".join((errors or list(lines) or ["it said nothing"])[-1].strip('"').split())[:500]


def _address(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://{host}:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
