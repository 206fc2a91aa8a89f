"""Random weights: drawn by name, always the same, into a module or straight into a safetensors file.

For structure and speed where no checkpoint is at hand: the values have the size of a fresh network's, so that nothing
overflows, and images are meaningless. A parameter's values depend on its name and shape alone, so whoever draws it gets
the same ones, in any order.
"""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from dipgo.base.dtypes import Dtype
from dipgo.base.files import new_file
from dipgo.base.safetensors_index import is_whole, safetensors_header

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
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    names: dict[nn.Parameter, str] = {}
    for prefix, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            names.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
            places.setdefault(parameter, []).append((owner, name))
    with _threads() as threads:
        values = threads.map(lambda each: draw(each[1], each[0].shape).to(each[0].dtype), names.items())
        for parameter, value in zip(names, values, strict=True):
            drawn = nn.Parameter(value, requires_grad=parameter.requires_grad)
            for owner, name in places[parameter]:
                setattr(owner, name, drawn)


def write_random(parameters: Mapping[str, tuple[int, ...]], dtype: Dtype, path: Path) -> None:
    """Write a safetensors file of parameters, shapes by name, whole or not at all; one that is there is kept.

    The values are ``draw(name, shape)`` in ``dtype``. Takes the memory of a block of values in each thread.

    Raises:
        DipgoError: the disk is full.
    """
    if is_whole(path, {name: (dtype, tuple(shape)) for name, shape in parameters.items()}):
        return
    header = safetensors_header({name: (dtype, shape) for name, shape in parameters.items()})
    sizes = [math.prod(shape) * dtype.itemsize for shape in parameters.values()]
    starts = itertools.accumulate(sizes, initial=len(header))
    with new_file(path) as draft, draft.open("wb") as stream, _threads() as threads:
        stream.write(header)
        stream.flush()

        def write(name: str, start: int) -> None:
            for block in _blocks(name, parameters[name]):
                content = block.to(dtype.torch).view(torch.uint8).numpy().data
                while content:
                    written = os.pwrite(stream.fileno(), content, start)
                    content, start = content[written:], start + written

        list(threads.map(write, parameters, starts))


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads())


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
