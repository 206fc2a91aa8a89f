"""The HTTP port that the world sees: it passes on to Triton what is in order, and answers the rest itself.

Bodies over the limit are 413, malformed requests 400, unknown paths 404, and on the way out everything new is 503 while
what is under way is finished. The administration of the server (loading models, shared memory, tracing) is not
offered.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from dipgo.base.errors import UsageError
from engines.serving.protocol import HEADER_LENGTH, rewritten

BODY_BYTES = 1_000_000
AT_ONCE = 256  # requests; what queues behind them in Triton is limited by the model
SLOW_S = 30.0  # a body that takes longer to arrive is given up

_MODEL = r"/v2/models/[A-Za-z0-9_.-]+(/versions/[0-9]+)?"
READABLE = re.compile(rf"/v2|/v2/health/(live|ready)|{_MODEL}(/(ready|config|stats))?")
INFER = re.compile(rf"{_MODEL}/infer")
PASSED_ON = ("Content-Type", HEADER_LENGTH)


@dataclass
class Gate:
    """The state of the gate.

    Attributes:
        behind: Triton's own address, ``http://host:port``.
        body_bytes: the largest body.
        draining: whether new requests are refused.
        under_way: requests that Triton has not answered yet.
    """

    behind: str
    body_bytes: int = BODY_BYTES
    draining: bool = False
    under_way: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def application(self) -> web.Application:
        """Return the web application; it opens its connections to Triton when it is started."""
        application = web.Application(client_max_size=self.body_bytes, middlewares=[_one_line])
        application.router.add_route("*", "/{path:.*}", self._handle)
        application.cleanup_ctx.append(self._session)
        return application

    async def drain(self, timeout_s: float) -> bool:
        """Refuse what is new and wait until what is under way is answered; returns whether it all was."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self.under_way:
                    self.idle.clear()
                    await self.idle.wait()
        except TimeoutError:
            return False
        return True

    async def _session(self, application: web.Application) -> AsyncIterator[None]:
        # No limit of its own: probes of health must not wait behind inference, which AT_ONCE limits already.
        connector, timeout = TCPConnector(limit=0), ClientTimeout(total=None, connect=10)
        async with ClientSession(connector=connector, timeout=timeout) as self._client:
            yield

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if request.method == "GET" and READABLE.fullmatch(path):
            if self.draining and path.endswith("/ready"):
                raise web.HTTPServiceUnavailable(text="the server is shutting down")
            return await self._forward("GET", path, None, {})
        if request.method == "POST" and INFER.fullmatch(path):
            return await self._infer(request)
        if READABLE.fullmatch(path) or INFER.fullmatch(path):
            raise web.HTTPMethodNotAllowed(request.method, ["POST" if INFER.fullmatch(path) else "GET"])
        raise web.HTTPNotFound(text="no such path; see /v2/models/NAME, and POST /v2/models/NAME/infer")

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        if self.draining:
            raise web.HTTPServiceUnavailable(text="the server is shutting down", headers={"Connection": "close"})
        if self.under_way >= AT_ONCE:
            raise web.HTTPServiceUnavailable(text=f"{AT_ONCE} requests are under way; try again later")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise web.HTTPUnsupportedMediaType(text="compressed bodies are not taken")
        length = request.content_length or 0
        if length > self.body_bytes:
            raise web.HTTPRequestEntityTooLarge(self.body_bytes, length)
        self.under_way += 1
        try:
            async with asyncio.timeout(SLOW_S):
                body = await request.read()
            content, header_length = rewritten(body, request.headers.get(HEADER_LENGTH))
            return await self._forward("POST", request.path, content, {HEADER_LENGTH: str(header_length)})
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(text=f"the body took more than {SLOW_S:g} s to arrive") from error
        except UsageError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        finally:
            self.under_way -= 1
            self.idle.set()

    async def _forward(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> web.Response:
        try:
            async with self._client.request(method, self.behind + path, data=content, headers=headers) as answer:
                body = await answer.read()
        except ClientError as error:
            raise web.HTTPBadGateway(text="Triton does not answer; see its log") from error
        headers = {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
        return web.Response(status=answer.status, body=body, headers=headers)


@web.middleware
async def _one_line(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer errors as Triton does: ``{"error": "one line"}``."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        line = " ".join((error.text or error.reason).split())
        headers = {name: error.headers[name] for name in ("Connection", "Allow") if name in error.headers}
        return web.json_response({"error": line}, status=error.status, headers=headers)
