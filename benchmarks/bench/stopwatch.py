"""How much of a loop is spent inside graphs: a runner that looks at the clock around every launch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from engines.backend import Buffer, Launch, Runner


class Stopwatch:
    """A runner like the one it is put around, but for the time it adds up.

    Attributes:
        seconds: inside launches since it was last set to 0, prologues with them.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def __enter__(self) -> Stopwatch:
        self._runner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.__exit__(*error)

    def bind(self, file: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Launch:
        launch = self._runner.bind(file, inputs, outputs)

        def timed() -> None:
            begin = time.perf_counter()
            launch()
            self.seconds += time.perf_counter() - begin

        return timed
