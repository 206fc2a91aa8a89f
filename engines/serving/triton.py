"""The Triton server as a process: how it is started, watched and ended, and why it ended."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from aiohttp import ClientError, ClientSession

from dipgo.base.errors import DipgoError

GRACE_S = 10.0  # for Triton to end once its requests have had their time
ADMINISTRATION = "shared-memory,model-repository,trace,logging"

_ERROR = re.compile(r"E\d{4} [^\]]*\] (.*)")


@dataclass(frozen=True)
class Addresses:
    """Where the server listens; port 0 takes any that is free, None is not served.

    Triton's gRPC port is its own: no gate stands before it, so keep it inside a network that you trust.
    """

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int | None = None
    metrics: int | None = 8002


def arguments(repository: Path, addresses: Addresses, port: int, token: str, drain_s: float) -> list[str]:
    """Return Triton's command line, for HTTP on a port that the gate alone knows; ``token`` names its shared memory."""
    grpc, metrics = ["--allow-grpc=false"], ["--allow-metrics=false"]
    if addresses.grpc is not None:
        closed = f"--grpc-restricted-protocol={ADMINISTRATION}:closed={token}"  # a key that nobody has
        grpc = [f"--grpc-address={addresses.host}", f"--grpc-port={addresses.grpc}", closed]
    if addresses.metrics is not None:
        metrics = [f"--metrics-address={addresses.host}", f"--metrics-port={addresses.metrics}"]
    return [
        f"--model-repository={repository}",
        f"--backend-config=python,shm-region-prefix-name=dipgo-{token}-",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--log-info=false",
        "--pinned-memory-pool-byte-size=0",
        f"--exit-timeout-secs={round(drain_s)}",
        *grpc,
        *metrics,
    ]


class Triton:
    """A Triton process under way.

    Attributes:
        process: the process.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._lines: deque[str] = deque(maxlen=200)
        self._reader = asyncio.create_task(self._pass_on())

    async def ended(self) -> str:
        """Wait until it has ended by itself; return how, with the error in its log that says most."""
        code = await self.process.wait()
        await self._reader
        errors = [error[1] for line in self._lines if (error := _ERROR.match(line))]
        reason = " ".join((errors or list(self._lines) or ["it said nothing"])[-1].strip('"').split())[:500]
        return f"Triton ended by itself, code {code}: {reason}"

    async def lost(self) -> None:
        """Wait until a model's process is gone: Triton goes on without it, says that it is ready, and answers 500."""
        models = psutil.Process(self.process.pid).children()
        while all(model.is_running() and model.status() != psutil.STATUS_ZOMBIE for model in models):
            await asyncio.sleep(0.5)

    async def end(self, drain_s: float) -> None:
        """End it: by a signal, and when it takes longer than it may, by force."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), drain_s + GRACE_S)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        await self._reader

    async def _pass_on(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self._lines.append(line.decode(errors="replace").rstrip())
            print(self._lines[-1], file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def running(command: list[str], environment: dict[str, str], drain_s: float) -> AsyncIterator[Triton]:
    """Start Triton, and end it on leaving."""
    try:
        # In a session of its own: Ctrl-C in a terminal reaches this process alone, which lets requests finish first.
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, start_new_session=True, stderr=asyncio.subprocess.PIPE, limit=2**20
        )
    except OSError as error:
        raise DipgoError(f"{command[0]}: cannot be started ({error.strerror}); give another --server") from error
    triton = Triton(process)
    try:
        yield triton
    finally:
        await triton.end(drain_s)


async def ready(address: str) -> None:
    """Wait until all models of a Triton at ``http://host:port`` are loaded and warm."""
    async with ClientSession() as client:
        while True:
            with contextlib.suppress(ClientError):
                async with client.get(f"{address}/v2/health/ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
