"""The gate before a stand-in for Triton that answers when it is told to."""

import asyncio
import json
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import ClientSession, TCPConnector, web

from dipgo.base.errors import DipgoError
from engines.serving import connections, gate
from engines.serving.gate import Gate
from engines.serving.protocol import TICKET

BODY = json.dumps({"inputs": [{"name": "class", "datatype": "BYTES", "shape": [1, 1], "data": ["3"]}]})
INFER = "/v2/models/m/infer"
QUEUE, AT_TRITON = 5, 8  # two instances of batch 2, and as much again


class Scene:
    """A gate and a client before a stand-in for Triton, whose model is busy until ``go`` is set."""

    def __init__(self, folder):
        self.arrived, self.tickets, self.go = asyncio.Semaphore(0), [], asyncio.Event()
        self.fault, self.folder, self.content = None, folder, ""

    @asynccontextmanager
    async def up(self):
        async def infer(request):
            self.tickets.append((await request.json())["parameters"][TICKET])
            self.arrived.release()
            await self.go.wait()
            return web.json_response({})

        async def config(request):
            parameters = {"queue": {"string_value": str(QUEUE)}, "wait_s": {"string_value": "0.5"}}
            return web.json_response({"max_batch_size": 2, "instance_group": [{"count": 2}], "parameters": parameters})

        async def live(request):
            return web.Response(text=self.content)

        triton = web.Application()
        triton.router.add_post(INFER, infer)
        triton.router.add_get("/v2/models/m/config", config)
        triton.router.add_get("/v2/health/{what}", live)
        runner = web.AppRunner(triton)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        behind = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self.gate = Gate("127.0.0.1", 0, behind, self.folder, lambda: self.fault)
        try:
            async with (
                self.gate.open() as self.address,
                ClientSession(connector=TCPConnector(limit=0), trust_env=False) as self.client,
            ):
                yield self
                self.go.set()
        finally:
            await runner.cleanup()

    async def ask(self, path=INFER, body=BODY, **more):
        """Return status, text and headers of an answer; a GET without a body."""
        method = "GET" if path != INFER else "POST"
        data = body if path == INFER else None
        async with self.client.request(method, self.address + path, data=data, **more) as answer:
            return answer.status, await answer.text(), answer.headers

    async def at_triton(self, count):
        """Send requests, and wait until they are at Triton."""
        tasks = [asyncio.create_task(self.ask()) for _ in range(count)]
        for _ in tasks:
            await asyncio.wait_for(self.arrived.acquire(), 30)
        return tasks

    async def connected(self, content):
        """Connect and send; returns the reader and the writer."""
        host, port = self.address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(content)
        await writer.drain()
        return reader, writer


def played(test):
    """Turn a coroutine function of a scene into a test."""

    def play(tmp_path, monkeypatch):
        async def run():
            async with asyncio.timeout(60), Scene(tmp_path).up() as scene:
                await test(scene, monkeypatch)

        asyncio.run(run())

    play.__name__ = test.__name__
    return play


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


@played
async def test_as_many_as_keep_the_instances_busy_are_at_triton_and_probes_do_not_wait(scene, monkeypatch):
    served = await scene.at_triton(AT_TRITON)
    waiting = [asyncio.create_task(scene.ask()) for _ in range(QUEUE)]
    await until(lambda: scene.gate._lines["m"]._waiting == QUEUE)
    status, text, headers = await scene.ask()
    assert (status, json.loads(text), headers["Retry-After"]) == (503, {"error": "Exceeds maximum queue size"}, "1")
    assert (await scene.ask("/v2/health/ready"))[0] == 200
    assert len(scene.tickets) == AT_TRITON
    scene.go.set()
    assert [status for status, _, _ in await asyncio.gather(*served, *waiting)] == [200] * (AT_TRITON + QUEUE)


@played
async def test_nobody_waits_longer_than_the_deployment_says_or_the_request(scene, monkeypatch):
    await scene.at_triton(AT_TRITON)
    short = json.dumps({**json.loads(BODY), "parameters": {"timeout": 1}})
    for body in (BODY, short):
        assert (await scene.ask(body=body))[:2] == (503, '{"error": "Request timeout expired"}')


@played
async def test_who_leaves_the_line_never_reaches_triton(scene, monkeypatch):
    served = await scene.at_triton(AT_TRITON)
    waiting = [asyncio.create_task(scene.ask()) for _ in range(QUEUE)]
    await until(lambda: scene.gate._lines["m"]._waiting == QUEUE)
    for task in waiting:
        task.cancel()
    await until(lambda: scene.gate._lines["m"]._waiting == 0)
    scene.go.set()
    await asyncio.gather(*served)
    assert len(scene.tickets) == AT_TRITON


@played
async def test_the_model_learns_who_has_left_until_it_has_answered(scene, monkeypatch):
    leaves, stays = await scene.at_triton(2)
    leaves.cancel()
    await until(lambda: list(scene.folder.iterdir()))
    assert [path.name for path in scene.folder.iterdir()] == [scene.tickets[0]]
    scene.go.set()
    assert (await stays)[0] == 200
    await until(lambda: not list(scene.folder.iterdir()))


@played
async def test_a_body_that_is_not_there_yet_takes_nobody_s_place(scene, monkeypatch):
    monkeypatch.setattr(gate, "BODY_S", 0.5)
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{{".encode()
    slow = [await scene.connected(head) for _ in range(AT_TRITON + QUEUE + 1)]
    scene.go.set()
    assert (await scene.ask())[0] == 200
    answers = [await reader.read(100) for reader, _ in slow]
    assert all(b" 408 " in answer for answer in answers)


@played
async def test_headers_that_never_end_are_closed(scene, monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_S", 0.5)
    reader, writer = await scene.connected(b"POST /v2 HTTP/1.1\r\n")
    end = asyncio.create_task(reader.read())
    while not end.done():
        writer.write(b"a: b\r\n")
        await asyncio.sleep(0.05)
    assert end.exception() or end.result() == b""


@played
async def test_the_oldest_without_a_request_makes_room_and_who_has_one_stays(scene, monkeypatch):
    monkeypatch.setattr(connections, "MOST", 20)
    served = await scene.at_triton(3)
    idle = [await scene.connected(b"POST /v2 HTTP/1.1\r\n") for _ in range(40)]
    assert (await scene.ask("/v2/health/live"))[0] == 200
    await asyncio.sleep(0.2)
    assert [reader.at_eof() or reader.exception() is not None for reader, _ in idle[:20]] == [True] * 20
    assert not idle[-1][0].at_eof()
    scene.go.set()
    assert [(await task)[0] for task in served] == [200] * 3


@played
async def test_an_answer_that_is_not_read_is_dropped(scene, monkeypatch):
    monkeypatch.setattr(gate, "TAKE_S", 0.5)
    scene.content = "x" * 50_000_000
    reader, _ = await scene.connected(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
    await asyncio.sleep(1)
    with suppress(ConnectionError):
        assert len(await reader.read()) < 50_000_000
    monkeypatch.setattr(gate, "TAKE_S", 60)
    assert len((await scene.ask("/v2/health/live"))[1]) == 50_000_000


@played
async def test_ready_is_what_a_request_would_find(scene, monkeypatch):
    assert (await scene.ask("/v2/health/ready"))[0] == 200
    scene.fault = "a model's process is stopped"
    for path in ("/v2/health/ready", "/v2/models/m/ready", INFER):
        assert (await scene.ask(path))[:2] == (503, '{"error": "a model\'s process is stopped"}')
    assert (await scene.ask("/v2/health/live"))[0] == 200


@played
async def test_draining_answers_what_is_complete_and_refuses_the_rest(scene, monkeypatch):
    served = await scene.at_triton(AT_TRITON)
    waiting = asyncio.create_task(scene.ask())
    await until(lambda: scene.gate._lines["m"]._waiting)
    drained = asyncio.create_task(scene.gate.drain(30))
    await asyncio.sleep(0)
    assert (await scene.ask())[:2] == (503, '{"error": "the server is shutting down"}')
    assert (await scene.ask("/v2/health/ready"))[0] == 503
    scene.go.set()
    await drained
    assert [status for status, _, _ in await asyncio.gather(*served, waiting)] == [200] * (AT_TRITON + 1)


@played
async def test_an_address_in_use_is_one_line(scene, monkeypatch):
    port = int(scene.address.rsplit(":", 1)[1])
    with pytest.raises(DipgoError, match=f"127.0.0.1:{port}: cannot be listened on"):
        async with Gate("127.0.0.1", port, scene.address, scene.folder).open():
            pass
