"""The line in which requests to a model wait.

They wait here, and no more of them are at Triton than keep its instances busy: then a client that leaves takes its
request along at no cost. Triton's own queue, with limits, also starts one request in thirty half a second late (2.51).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from engines.serving.limits import Limits


class Line:
    """The line of one model.

    Args:
        config: the model's configuration, as Triton gives it: batch, instances, and the limits of a deployment.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._queue = int(parameters.get("queue", Limits.queue))
        self._wait_s = float(parameters.get("wait_s", Limits.wait_s))
        groups = config.get("instance_group", [])
        instances = sum(group["count"] * max(1, len(group.get("gpus", ()))) for group in groups) or 1
        self._slots = asyncio.Semaphore(2 * instances * max(1, config["max_batch_size"]))  # one batch runs, one waits
        self._waiting = 0

    async def enter(self, timeout_s: float | None) -> None:
        """Wait for one's turn; whoever had it must :meth:`leave`.

        Raises:
            HTTPServiceUnavailable: the line is full, or it took too long.
        """
        if self._slots.locked() and self._waiting >= self._queue:
            raise web.HTTPServiceUnavailable(text="Exceeds maximum queue size")
        self._waiting += 1
        try:
            async with asyncio.timeout(min(timeout_s or self._wait_s, self._wait_s)):
                await self._slots.acquire()
        except TimeoutError as error:
            raise web.HTTPServiceUnavailable(text="Request timeout expired") from error
        finally:
            self._waiting -= 1

    def leave(self) -> None:
        self._slots.release()
