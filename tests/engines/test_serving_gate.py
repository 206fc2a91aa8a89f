"""The gate before a stand-in for Triton that answers when it is told to."""

import asyncio

from aiohttp import ClientSession, TCPConnector, web

from engines.serving.gate import AT_ONCE, Gate

BODY = {"inputs": [{"name": "class", "datatype": "BYTES", "shape": [1, 1], "data": ["3"]}]}


async def listening(application):
    """Serve an application; returns what ends it, and its address."""
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def asked_at_once(count):
    """Send requests that wait at Triton, then ask for its health and once more; returns all statuses."""
    arrived, go = asyncio.Semaphore(0), asyncio.Event()

    async def infer(request):
        arrived.release()
        await go.wait()
        return web.json_response({})

    async def live(request):
        return web.Response()

    triton = web.Application()
    triton.router.add_post("/v2/models/m/infer", infer)
    triton.router.add_get("/v2/health/live", live)
    behind, address = await listening(triton)
    gate, front = await listening(Gate(address).application())

    async def status(method, path, **given):
        async with client.request(method, front + path, **given) as answer:
            return answer.status

    try:
        async with ClientSession(connector=TCPConnector(limit=0)) as client:
            waiting = [asyncio.create_task(status("POST", "/v2/models/m/infer", json=BODY)) for _ in range(count)]
            for _ in waiting:
                await asyncio.wait_for(arrived.acquire(), 60)
            meanwhile = await status("GET", "/v2/health/live")
            one_more = await status("POST", "/v2/models/m/infer", json=BODY)
            go.set()
            return meanwhile, one_more, await asyncio.gather(*waiting)
    finally:
        go.set()
        await gate.cleanup()
        await behind.cleanup()


def test_as_many_requests_as_it_says_reach_triton_and_probes_do_not_wait_behind_them():
    meanwhile, one_more, served = asyncio.run(asked_at_once(AT_ONCE))
    assert meanwhile == 200
    assert one_more == 503
    assert served == [200] * AT_ONCE
