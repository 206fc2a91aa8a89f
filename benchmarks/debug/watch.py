"""A runner whose launches are seen, with what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.debug.differences import Values
from engines.backend import Buffer, Launch, Runner

Observe = Callable[[str, Values, Values], None]
"""``(file, inputs, outputs)`` of a launch, as arrays of their own."""


class Watched:
    """A runner like the one it is put around, which shows ``observe`` every launch; none are captured as one."""

    def __init__(self, runner: Runner, observe: Observe) -> None:
        self._runner, self._observe = runner, observe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def __enter__(self) -> Watched:
        self._runner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.__exit__(*error)

    def capture(self, launches: Sequence[Launch]) -> None:
        return None

    def bind(self, file: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Launch:
        launch = self._runner.bind(file, inputs, outputs)

        def watched() -> None:
            before = self._values(inputs)  # an output may lie where an input lay
            launch()
            self._observe(file, before, self._values(outputs))

        return watched

    def run(self, file: str, inputs: Values) -> dict[str, np.ndarray]:
        outputs = self._runner.run(file, inputs)
        self._observe(file, inputs, outputs)
        return outputs

    def _values(self, buffers: Mapping[str, Buffer]) -> Values:
        return {name: np.array(self._runner.read(buffer)) for name, buffer in buffers.items()}
