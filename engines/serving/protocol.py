"""An inference request over HTTP (KServe protocol 2, JSON with binary tensors behind it), read strictly.

Triton's own parser answers much of what is malformed with 500, and deep nesting overruns its stack. So nothing reaches
it but what was read here and written anew.
"""

from __future__ import annotations

import json
from math import prod
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from dipgo.base.errors import UsageError
from dipgo.base.records import Record

HEADER_LENGTH = "Inference-Header-Content-Length"
TICKET = "dipgo_ticket"  # the parameter by which the model knows whose client has left
PICTURES = ("png",)  # outputs that JSON cannot hold

Size = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=64)]
RANGES: dict[str, float] = {"BYTES": 0, "INT32": 2**31, "INT64": 2**63, "FP32": 3e38}
KINDS = {"BYTES": (str,), "INT32": (int,), "INT64": (int,), "FP32": (int, float)}


class InputParameters(Record):
    binary_data_size: Size | None = None


class Input(Record):
    """A tensor, in ``data`` or behind the JSON; shared memory is not offered."""

    name: Name
    datatype: Literal["BYTES", "INT32", "INT64", "FP32"]
    shape: Annotated[list[Size], Field(min_length=1, max_length=4)]
    parameters: InputParameters = InputParameters()
    data: Annotated[list[Any], Field(max_length=4096)] | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> Input:
        if (self.data is None) == (self.parameters.binary_data_size is None):
            raise ValueError("give either data or binary_data_size")
        if self.data is not None:
            if len(self.data) != prod(self.shape):
                raise ValueError(f"data has {len(self.data)} elements, shape {self.shape} has {prod(self.shape)}")
            kinds, limit = KINDS[self.datatype], RANGES[self.datatype]
            for value in self.data:
                if type(value) not in kinds or (not isinstance(value, str) and not -limit <= value < limit):
                    raise ValueError(f"data holds {json.dumps(value)[:40]}, which is no {self.datatype}")
        return self


class OutputParameters(Record):
    binary_data: StrictBool | None = None


class Output(Record):
    name: Name
    parameters: OutputParameters = OutputParameters()


class RequestParameters(Record):
    """``timeout`` is in microseconds, as in Triton."""

    binary_data_output: StrictBool | None = None
    timeout: Annotated[StrictInt, Field(gt=0, lt=2**63)] | None = None


class InferenceRequest(Record):
    id: Annotated[StrictStr, Field(max_length=128, pattern=r"^[\x20-\x7e]*$")] = ""
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[Input], Field(max_length=16)]
    outputs: Annotated[list[Output], Field(min_length=1, max_length=16)] = Field(
        default_factory=lambda: [Output(name="image"), Output(name="seed")]
    )


def rewritten(body: bytes, header_length: str | None, ticket: str) -> tuple[bytes, int, float | None]:
    """Check the body of a request and return what to send on: the body, and the length of the JSON at its start.

    Third is how many seconds the request may wait, if it says so. ``ticket`` is added to its parameters, for the model.

    Raises:
        UsageError: not valid JSON of a request, or binary data of another length than announced.
    """
    if header_length is not None and not (header_length.isascii() and header_length.isdecimal()):
        raise UsageError(f"{HEADER_LENGTH} is no number")
    length = len(body) if header_length is None else int(header_length[:12])
    if length > len(body):
        raise UsageError(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    request, tail = _request(body[:length]), body[length:]
    size = sum(entry.parameters.binary_data_size or 0 for entry in request.inputs)
    if size != len(tail):
        raise UsageError(f"binary_data_size of the inputs is {size} in all, but {len(tail)} bytes follow the JSON")
    try:
        content = request.model_dump(exclude_none=True)
        content["parameters"][TICKET] = ticket
        header = json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError("the request holds half a character of UTF-16") from error
    timeout = request.parameters.timeout
    return header + tail, len(header), timeout and timeout / 1e6


def _request(text: bytes) -> InferenceRequest:
    try:
        request = InferenceRequest.model_validate(json.loads(text, parse_constant=_refuse))
    except RecursionError as error:
        raise UsageError("the request's JSON is nested too deeply") from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{place or 'request'}: {first['msg'].removeprefix('Value error, ')}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise UsageError(f"the request is not valid JSON ({' '.join(str(error).split())[:120]})") from error
    for output in request.outputs:
        binary = output.parameters.binary_data
        if output.name in PICTURES and not (request.parameters.binary_data_output if binary is None else binary):
            raise UsageError(
                f'output {output.name} cannot be JSON; ask for it with "parameters": {{"binary_data": true}}'
            )
    return request


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
