"""Connections to the gate: how many there may be, and how long one may take to send a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

from dipgo.base.errors import DipgoError

MOST = 512
BACKLOG = 128  # accepted at a time
DESCRIPTORS = MOST + 2 * BACKLOG + 64  # those that are closing, and the files that a process has anyway
HEADERS_S = 15.0  # a connection that takes longer to send a request's headers, its first or the next, is closed


class _Connection(web.RequestHandler):
    """A connection. Beyond :data:`MOST` of them the oldest without a complete request makes room."""

    def __init__(self, server: web.Server, busy: set[Any]) -> None:
        options: dict[str, Any] = {"keepalive_timeout": HEADERS_S, "access_log": None, "auto_decompress": False}
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._server, self._busy = server, busy

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        there = [each for each in self._server.connections if each.transport and not each.transport.is_closing()]
        if len(there) > MOST:
            oldest = next(each for each in there if each is self or each not in self._busy)
            assert oldest.transport is not None
            oldest.transport.abort()


@asynccontextmanager
async def listening(application: web.Application, host: str, port: int, busy: set[Any]) -> AsyncIterator[str]:
    """Serve an application; yields its address. A handler is cancelled when its client leaves.

    Args:
        application: what answers.
        host, port: where to listen; port 0 takes any that is free.
        busy: the protocols (``request.protocol``) of complete requests, which the application keeps; never closed here.

    Raises:
        DipgoError: the address is in use, or is none of this machine's.
    """
    logging.getLogger("aiohttp.server").addFilter(_worth_a_line)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=5.0)
    await runner.setup()
    server = runner.server
    assert server is not None
    try:
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: _Connection(server, busy), host, port, backlog=BACKLOG)
    except OSError as error:
        await runner.cleanup()
        raise DipgoError(
            f"{host}:{port}: cannot be listened on ({error.strerror}); give another --http-port"
        ) from error
    try:
        yield "http://{}:{}".format(*listener.sockets[0].getsockname()[:2])
    finally:
        listener.close()
        await runner.cleanup()


def _worth_a_line(entry: logging.LogRecord) -> bool:
    """Whoever sends what is no HTTP is answered 400; a traceback of each would fill the log."""
    return not (entry.exc_info and isinstance(entry.exc_info[1], HttpProcessingError))
