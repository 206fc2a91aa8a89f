"""Run Triton on a model repository behind the gate, from the first model loaded to the last request answered."""

from __future__ import annotations

import asyncio
import resource
import secrets
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dipgo.base.errors import DipgoError
from engines.serving.connections import DESCRIPTORS
from engines.serving.gate import BODY_BYTES, Gate
from engines.serving.install import Install, prepare
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
    _raise_descriptors()
    with tempfile.TemporaryDirectory(prefix="dipgo-serve-") as scratch:
        place = prepare(install, Path(scratch))
        command = [str(install.binary.resolve()), f"--backend-directory={place.backends}"]
        command += arguments(repository.resolve(), addresses, port, token, times.drain_s)

        async def run() -> None:
            stop = asyncio.Event()
            for number in previous:
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            async with running(command, place, times.drain_s) as triton:
                behind = f"http://127.0.0.1:{port}"
                gate = Gate(addresses.host, addresses.http, behind, place.left, triton.fault, body_bytes)
                await _watch(triton, gate, stop, announce, times)

        try:
            asyncio.run(run())
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for file in Path("/dev/shm").glob(f"dipgo-{token}-*"):  # of a model's process that was killed
                file.unlink(missing_ok=True)


async def _watch(
    triton: Triton, gate: Gate, stopping: asyncio.Event, announce: Callable[[str], None], times: Times
) -> None:
    """Open the gate once Triton is ready; return when it is to stop and all requests are answered."""
    stop = asyncio.create_task(stopping.wait())
    end = asyncio.create_task(triton.ended())
    begin = asyncio.create_task(ready(gate.behind))
    await asyncio.wait({stop, end, begin}, timeout=times.start_s, return_when=asyncio.FIRST_COMPLETED)
    if begin.done() and not stop.done():
        loss = asyncio.create_task(triton.lost())
        async with gate.open() as address:  # closed before Triton ends, which waits for connections that are open
            announce(f"ready: {address}, Ctrl-C ends it")
            await asyncio.wait({stop, end, loss}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                await gate.drain(times.drain_s)
        if loss.done():
            triton.kill()  # it would wait for the process that is gone
            raise DipgoError(f"{loss.result()}; start the server again")
    if end.done():
        raise DipgoError(end.result())
    if not stop.done():
        raise DipgoError(f"Triton was not ready within {times.start_s:g} s; its log says why")


def _raise_descriptors() -> None:
    """Let this process, and Triton, hold as many connections as the gate lets in.

    Raises:
        DipgoError: the machine does not allow it.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= most < DESCRIPTORS:
        raise DipgoError(f"a process may have {most} files open here, serving takes {DESCRIPTORS}; raise 'ulimit -n'")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
