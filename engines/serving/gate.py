"""The HTTP port that the world sees: it passes on to Triton what is in order, and answers the rest itself.

Bodies over the limit are 413, malformed requests 400, unknown paths 404; while Triton could not serve a request, or is
on its way out, it is 503, and so is readiness. The administration of the server (loading models, shared memory,
tracing) is not offered. A client that leaves takes its request along.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from dipgo.base.errors import UsageError
from engines.serving.connections import listening
from engines.serving.line import Line
from engines.serving.protocol import HEADER_LENGTH, rewritten

BODY_BYTES = 1_000_000
BODY_S = 30.0  # a body that takes longer to arrive is given up
TAKE_S = 60.0  # a client that takes longer to read its answer is given up
ANSWER_S = 5.0  # for Triton to answer what is no inference
POLL_S = 0.05

_MODEL = r"/v2/models/(?P<model>[A-Za-z0-9_.-]+)(/versions/[0-9]+)?"
READABLE = re.compile(rf"/v2|/v2/health/(live|ready)|{_MODEL}(/(ready|config|stats))?")
INFER = re.compile(rf"{_MODEL}/infer")
PASSED_ON = ("Content-Type", HEADER_LENGTH)


@dataclass
class Gate:
    """The state of the gate.

    Attributes:
        host, port: where it listens.
        behind: Triton's own address, ``http://host:port``.
        left: a folder; a file in it tells the model that the client of the request of that ticket has left.
        fault: returns why Triton would not serve a request now, or None.
        body_bytes: the largest body.
        draining: whether new requests are refused.
    """

    host: str
    port: int
    behind: str
    left: Path
    fault: Callable[[], str | None] = lambda: None
    body_bytes: int = BODY_BYTES
    draining: bool = False
    _lines: dict[str, Line] = field(default_factory=dict)
    _complete: set[Any] = field(default_factory=set)  # connections with a request that is all there
    _at_triton: set[asyncio.Task[web.Response]] = field(default_factory=set)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """Listen; yields the address, and closes with the context.

        Raises:
            DipgoError: the address is in use, or is none of this machine's.
        """
        application = web.Application(client_max_size=self.body_bytes, middlewares=[_answered])
        application.router.add_route("*", "/{path:.*}", self._handle)
        connector, timeout = TCPConnector(limit=0), ClientTimeout(total=None, connect=ANSWER_S)
        async with (
            ClientSession(connector=connector, timeout=timeout) as self._client,
            listening(application, self.host, self.port, self._complete) as address,
        ):
            yield address

    async def drain(self, timeout_s: float) -> None:
        """Refuse what is new and wait until what is complete is answered."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (self._complete or self._at_triton) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(POLL_S)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if request.method == "GET" and READABLE.fullmatch(path):
            if path.endswith("/ready"):
                self._check_open()
            return await self._forward("GET", path, None, {}, ANSWER_S)
        if request.method == "POST" and (match := INFER.fullmatch(path)):
            return await self._infer(request, match["model"])
        if READABLE.fullmatch(path) or INFER.fullmatch(path):
            raise web.HTTPMethodNotAllowed(request.method, ["POST" if INFER.fullmatch(path) else "GET"])
        raise web.HTTPNotFound(text="no such path; see /v2/models/NAME, and POST /v2/models/NAME/infer")

    def _check_open(self) -> None:
        fault = self.fault() or ("the server is shutting down" if self.draining else None)
        if fault:
            raise web.HTTPServiceUnavailable(text=fault, headers={"Connection": "close"})

    async def _infer(self, request: web.Request, model: str) -> web.StreamResponse:
        self._check_open()
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise web.HTTPUnsupportedMediaType(text="compressed bodies are not taken")
        length = request.content_length or 0
        if length > self.body_bytes:
            raise web.HTTPRequestEntityTooLarge(self.body_bytes, length)
        try:
            async with asyncio.timeout(BODY_S):
                body = await request.read()
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(text=f"the body took more than {BODY_S:g} s to arrive") from error
        ticket = self.left / secrets.token_hex(8)
        try:
            content, header_length, timeout_s = rewritten(body, request.headers.get(HEADER_LENGTH), ticket.name)
        except UsageError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        self._check_open()
        self._complete.add(request.protocol)
        try:
            if model not in self._lines:
                config = await self._forward("GET", f"/v2/models/{model}/config", None, {}, ANSWER_S)
                if config.status != 200:
                    return config
                self._lines.setdefault(model, Line(json.loads(config.text or "")))
            line = self._lines[model]
            await line.enter(timeout_s)
            headers = {HEADER_LENGTH: str(header_length)}
            response = await self._at_model(request.path, content, headers, ticket, line.leave)
        finally:
            self._complete.discard(request.protocol)
        if response.status == 500:  # where a model's process is stopped, Triton gives up on its request
            self._check_open()
        return response

    async def _at_model(
        self, path: str, content: bytes, headers: dict[str, str], ticket: Path, leave: Callable[[], None]
    ) -> web.Response:
        """Pass a request on; when its client leaves, the model hears of it, and Triton's answer is waited for."""
        answer = asyncio.create_task(self._forward("POST", path, content, headers, None))
        self._at_triton.add(answer)

        def done(answer: asyncio.Task[web.Response]) -> None:
            self._at_triton.discard(answer)
            ticket.unlink(missing_ok=True)
            leave()
            if not answer.cancelled():
                answer.exception()  # nobody may be left to hear of it

        answer.add_done_callback(done)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if not answer.done():
                self.left.mkdir(exist_ok=True)  # whatever cleans /tmp
                ticket.touch()
            raise

    async def _forward(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], timeout_s: float | None
    ) -> web.Response:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._client.request(method, self.behind + path, data=content, headers=headers) as answer,
            ):
                body = await answer.read()
        except ClientError as error:
            raise web.HTTPBadGateway(text="Triton does not answer; see its log") from error
        except TimeoutError as error:
            raise web.HTTPServiceUnavailable(text="Triton does not answer; see its log") from error
        headers = {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
        return web.Response(status=answer.status, body=body, headers=headers)


@web.middleware
async def _answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Send the answer; errors as Triton has them, ``{"error": "one line"}``, a 503 with when to come again."""
    try:
        answer = await handler(request)
    except web.HTTPException as error:
        line = " ".join((error.text or error.reason).split())
        headers = {name: error.headers[name] for name in ("Connection", "Allow") if name in error.headers}
        answer = web.json_response({"error": line}, status=error.status, headers=headers)
    if answer.status == 503:
        answer.headers["Retry-After"] = "1"
    try:
        async with asyncio.timeout(TAKE_S):
            await answer.prepare(request)
            await answer.write_eof()
    except (TimeoutError, ConnectionError):
        if request.transport:
            request.transport.abort()  # with all that it has not read
    return answer
