"""Run Triton on a model repository behind the gate, from the first model loaded to the last request answered."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from dipgo.base.errors import DipgoError
from engines.serving.gate import BODY_BYTES, Gate
from engines.serving.install import Install, prepare_backends
from engines.serving.triton import Addresses, Triton, arguments, free_port, ready, running


@dataclass(frozen=True)
class Times:
    """Seconds until the models must be ready, and seconds that requests have to finish on the way out."""

    start_s: float = 600.0
    drain_s: float = 60.0


def serve(
    repository: Path,
    install: Install,
    addresses: Addresses,
    announce: Callable[[str], None],
    times: Times | None = None,
    body_bytes: int = BODY_BYTES,
) -> None:
    """Serve a model repository until SIGTERM or SIGINT; requests under way are then finished, new ones refused.

    Args:
        repository: what :func:`engines.serving.repository.write_repository` wrote.
        install: the server.
        addresses: where to listen.
        announce: called with a line that says where, once all models are loaded and warm.
        times: how long to wait.
        body_bytes: the largest body over HTTP.

    Raises:
        DipgoError: a port is in use, a model does not load, or the server or a model's process ends by itself.
    """
    times = times or Times()
    token, port = secrets.token_hex(16), free_port()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    gate = Gate(f"http://127.0.0.1:{port}", body_bytes)

    async def run(command: list[str], environment: dict[str, str]) -> None:
        stop = asyncio.Event()
        for number in previous:
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        # The gate closes first: on its way out Triton waits for connections that are open.
        async with running(command, environment, times.drain_s) as triton, _application(gate) as runner:
            await _watch(triton, gate, stop, lambda: _open(runner, addresses, announce), times)

    with tempfile.TemporaryDirectory(prefix="dipgo-serve-") as scratch:
        backends, environment = prepare_backends(install, Path(scratch))
        options = arguments(repository, addresses, port, token, times.drain_s)
        try:
            asyncio.run(run([str(install.binary), f"--backend-directory={backends}", *options], environment))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for file in Path("/dev/shm").glob(f"dipgo-{token}-*"):  # of a model's process that was killed
                file.unlink(missing_ok=True)


async def _watch(
    triton: Triton, gate: Gate, stopping: asyncio.Event, open_gate: Callable[[], Awaitable[None]], times: Times
) -> None:
    """Open the gate once Triton is ready; return when it is to stop and all requests are answered."""
    stop = asyncio.create_task(stopping.wait())
    end = asyncio.create_task(triton.ended())
    begin = asyncio.create_task(ready(gate.behind))
    await asyncio.wait({stop, end, begin}, timeout=times.start_s, return_when=asyncio.FIRST_COMPLETED)
    if begin.done() and not stop.done():
        await open_gate()
        loss = asyncio.create_task(triton.lost())
        await asyncio.wait({stop, end, loss}, return_when=asyncio.FIRST_COMPLETED)
        if loss.done() and not stop.done():
            triton.process.kill()  # it would wait for the process that is gone
            raise DipgoError("a model's process ended by itself (out of memory?); start the server again")
    if end.done() and not stop.done():
        raise DipgoError(end.result())
    if not stop.done():
        raise DipgoError(f"Triton was not ready within {times.start_s:g} s; its log says why")
    await gate.drain(times.drain_s)


@contextlib.asynccontextmanager
async def _application(gate: Gate) -> AsyncIterator[web.AppRunner]:
    runner = web.AppRunner(gate.application(), access_log=None, auto_decompress=False, shutdown_timeout=5.0)
    await runner.setup()
    try:
        yield runner
    finally:
        await runner.cleanup()


async def _open(runner: web.AppRunner, addresses: Addresses, announce: Callable[[str], None]) -> None:
    try:
        await web.TCPSite(runner, addresses.host, addresses.http).start()
    except OSError as error:
        place = f"{addresses.host}:{addresses.http}"
        raise DipgoError(f"{place}: cannot be listened on ({error.strerror}); give another --http-port") from error
    host, port = runner.addresses[0][:2]
    announce(f"ready: http://{host}:{port}, Ctrl-C ends it")
