"""The model that Triton's Python backend runs; 'dipgo deploy' copies this file to ``1/model.py``.

It needs the packages ``dipgo``, ``engines`` and ``export`` in the server's Python, but neither torch nor diffusers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # only inside the server

from dipgo.base.errors import DipgoError, UsageError
from engines.pipeline.pipeline import load
from engines.serving.limits import Limits
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
        for index, request in enumerate(requests):
            try:
                if request.is_cancelled():
                    answers[index] = _refusal("cancelled by the client", triton.TritonError.CANCELLED)
                else:
                    valid[index] = read_rows(self.program, self._tensors(request), self.limits)
            except UsageError as error:
                answers[index] = _refusal(str(error), triton.TritonError.INVALID_ARG)
            except Exception as error:  # a request that nobody thought of must not take the others with it
                triton.Logger.log_error(f"request not understood: {error!r}")
                answers[index] = _refusal("the request cannot be read", triton.TritonError.INVALID_ARG)
        for index, images in self._images(valid).items():
            if isinstance(images, Exception):
                triton.Logger.log_error(f"generation failed: {images!r}")
                line = f"generation failed ({' '.join(str(images).split())[:200]})"
                answers[index] = _refusal(line, triton.TritonError.INTERNAL)
            else:
                answers[index] = _answer(valid[index], images, requests[index].requested_output_names())
        return answers

    def finalize(self) -> None:
        self.program.__exit__()

    def _tensors(self, request: Any) -> dict[str, np.ndarray | None]:
        tensors = {name: triton.get_input_tensor_by_name(request, name) for name in self.inputs}
        return {name: None if tensor is None else tensor.as_numpy() for name, tensor in tensors.items()}

    def _images(self, valid: dict[int, list[Row]]) -> dict[int, list[np.ndarray] | Exception]:
        """Return the images of each request, or what went wrong; if it does for all together, each is tried alone."""
        try:
            images = iter(render(self.program, [row for rows in valid.values() for row in rows]))
            return {index: [next(images) for _ in rows] for index, rows in valid.items()}
        except Exception as error:  # whatever it is: every request is answered, and the next batch has its chance
            if len(valid) == 1:
                return dict.fromkeys(valid, error)
            alone = [self._images({index: rows}) for index, rows in valid.items()]
            return {index: images for single in alone for index, images in single.items()}


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
