"""Random weights: drawn by name, always the same, into a module or straight into a safetensors file.

For structure and speed where no checkpoint is at hand: the values have the size of a fresh network's, so that nothing
overflows, and images are meaningless. A parameter's values depend on its name and shape alone, so whoever draws it gets
the same ones, in any order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dipgo.base.dtypes import Dtype
from dipgo.base.files import new_file
from dipgo.model.safetensors_index import is_whole, safetensors_header

_BLOCK = 2**18  # values drawn at a time: in the cache, a normal draw takes a quarter of the time that it takes outside


def draw(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the float32 values of the parameter ``name``, ``[*shape]``.

    Two or more dimensions are normal with a standard deviation of 1 / sqrt(fan in), the product of all dimensions but
    the first. Of those with one, ``…weight`` (a norm's) is ones, others (biases) are normal with 0.02. A scalar is 1.
    """
    flat = torch.empty(math.prod(shape))
    start = 0
    for block in _blocks(name, shape):
        flat[start : start + len(block)] = block
        start += len(block)
    return flat.reshape(tuple(shape))


def randomise(module: nn.Module) -> None:
    """Replace a module's parameters, on the meta device or not, by :func:`draw` of their names, on the CPU.

    Data types and ``requires_grad`` stay. A parameter that the module holds under several names is drawn by the first,
    as ``named_parameters`` gives it.
    """
    drawn: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in drawn:
                values = draw(f"{prefix}.{name}" if prefix else name, parameter.shape).to(parameter.dtype)
                drawn[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(owner, name, drawn[parameter])


def write_random(parameters: Mapping[str, tuple[int, ...]], dtype: Dtype, path: Path) -> None:
    """Write a safetensors file of parameters, shapes by name, whole or not at all; one that is there is kept.

    The values are ``draw(name, shape)`` in ``dtype``. Takes the memory of one block of values, not of a parameter.

    Raises:
        DipgoError: the disk is full.
    """
    if is_whole(path, {name: (dtype, tuple(shape)) for name, shape in parameters.items()}):
        return
    with new_file(path) as draft, draft.open("wb") as stream:
        stream.write(safetensors_header({name: (dtype, shape) for name, shape in parameters.items()}))
        for name, shape in parameters.items():
            for block in _blocks(name, shape):
                stream.write(block.to(dtype.torch).view(torch.uint8).numpy().data)


def _blocks(name: str, shape: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield a parameter's values, flat, a block at a time; a block's memory is used again for the next."""
    count = math.prod(shape)
    block = torch.ones(min(count, _BLOCK))
    constant = not shape or (len(shape) == 1 and name.endswith("weight"))
    deviation = 0.02 if len(shape) == 1 else max(1, math.prod(shape[1:])) ** -0.5
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for start in range(0, count, _BLOCK):
        part = block[: count - start]
        yield part if constant else part.normal_(0, deviation, generator=generator)
