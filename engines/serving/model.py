"""The model that Triton's Python backend runs; 'dipgo deploy' copies this file to ``1/model.py``.

It needs the packages ``dipgo``, ``engines`` and ``export`` in the server's Python, but neither torch nor diffusers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # only inside the server

from dipgo.base.errors import DipgoError, UsageError
from engines.pipeline.pipeline import load
from engines.serving.install import LEFT
from engines.serving.limits import Limits
from engines.serving.protocol import TICKET
from engines.serving.requests import Row, png, read_rows, render

BUNDLE = "bundle"  # beside this file


class TritonPythonModel:
    """A program, and its requests: each is answered, with images or with one line that says what is wrong with it."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.inputs = [entry["name"] for entry in config["input"]]
        self.limits = Limits(prompt=int(parameters["max_prompt"]), images=int(parameters["max_images"]))
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        try:
            program = load(folder, int(parameters["threads"]) or None, parameters["backend"])
            self.program = program.__enter__()
        except DipgoError as error:
            raise triton.TritonModelException(str(error)) from error

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request of a batch; those that are in order are rendered together."""
        answers: list[Any] = [None] * len(requests)
        valid: dict[int, list[Row]] = {}
        left: dict[int, Callable[[], bool]] = {}
        for index, request in enumerate(requests):
            try:
                left[index] = _left(request)
                valid[index] = read_rows(self.program, self._tensors(request), self.limits)
            except UsageError as error:
                answers[index] = _refusal(str(error), triton.TritonError.INVALID_ARG)
            except Exception as error:  # a request that nobody thought of must not take the others with it
                triton.Logger.log_error(f"request not understood: {error!r}")
                answers[index] = _refusal("the request cannot be read", triton.TritonError.INVALID_ARG)
        for index, result in self._images(valid, left).items():
            if isinstance(result, Exception):
                triton.Logger.log_error(f"generation failed: {result!r}")
                line = f"generation failed ({' '.join(str(result).split())[:200]})"
                answers[index] = _refusal(line, triton.TritonError.INTERNAL)
            elif len(images := [each for each in result if each is not None]) < len(result):
                answers[index] = _refusal("the client has left", triton.TritonError.CANCELLED)
            else:
                answers[index] = _answer(valid[index], images, requests[index].requested_output_names())
        return answers

    def finalize(self) -> None:
        self.program.__exit__()

    def _tensors(self, request: Any) -> dict[str, np.ndarray | None]:
        tensors = {name: triton.get_input_tensor_by_name(request, name) for name in self.inputs}
        return {name: None if tensor is None else tensor.as_numpy() for name, tensor in tensors.items()}

    def _images(
        self, valid: dict[int, list[Row]], left: dict[int, Callable[[], bool]]
    ) -> dict[int, list[np.ndarray | None] | Exception]:
        """Return the images of each request, or what went wrong; if it does for all together, each is tried alone."""
        owners = [index for index, rows in valid.items() for _ in rows]
        try:
            rows = [row for rows in valid.values() for row in rows]
            images = iter(render(rows, lambda row: left[owners[row]]()))
            return {index: [next(images) for _ in rows] for index, rows in valid.items()}
        except Exception as error:  # whatever it is: every request is answered, and the next batch has its chance
            if len(valid) == 1:
                return dict.fromkeys(valid, error)
            alone = [self._images({index: rows}, left) for index, rows in valid.items()]
            return {index: images for single in alone for index, images in single.items()}


def _left(request: Any) -> Callable[[], bool]:
    """Return what tells whether the client of a request has left.

    Triton says so of gRPC's alone; of HTTP's the gate does, by a file.
    """
    ticket = json.loads(request.parameters()).get(TICKET)
    return (Path(os.environ[LEFT]) / ticket).exists if ticket and LEFT in os.environ else request.is_cancelled


def _answer(rows: list[Row], images: list[np.ndarray], names: list[str]) -> Any:
    """Make a response: ``image`` ``[R, N, height, width, channels]``, ``png`` ``[R, N]``, ``seed`` ``[R, 1]``."""
    makers = {
        "image": lambda: np.stack(images),
        "png": lambda: np.array([[png(image) for image in some] for some in images], np.object_),
        "seed": lambda: np.array([[row.seed] for row in rows], np.int64),
    }
    return triton.InferenceResponse([triton.Tensor(name, makers[name]()) for name in names])


def _refusal(line: str, code: int) -> Any:
    return triton.InferenceResponse(error=triton.TritonError(line, code))
