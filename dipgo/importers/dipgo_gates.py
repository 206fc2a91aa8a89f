"""DiP-GO gates: the pickle that the public code writes, or a fact sheet of it in JSON.

The pickle is ``list[steps]`` of ``dict[block key -> float32 tensor [2]]``, ``[0, 1]`` = compute and ``[1, 0]`` =
reuse. A key is ``(part, kind, depth, 0)``, with ``depth`` counted from the input on the way down and, reversed, from
the output on the way up: ``("up", "block", 0, 0)`` is the last up block. Each tensor holds its storage as bytes, in
turn a file of torch's legacy format; both layers are read as data (:mod:`dipgo.importers.pickles`).

The JSON has the keys as text, ``"block_order": ["down/block/0/0", …]``, and ``"keep"``: 0 and 1, ``[steps][blocks]``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo.base.records import MOST_CALLS
from dipgo.importers.pickles import PERSISTENT, Call, Name, read_pickle
from dipgo.importers.published import Published, by_call, is_mask
from dipgo.schedule.search_record import Cost

if TYPE_CHECKING:
    from torch import nn

    from dipgo.graph.trace import Trace

_TENSOR = "torch._utils._rebuild_tensor_v2"
_STORAGE = "torch.storage._load_from_bytes"
_GLOBALS = (_TENSOR, _STORAGE, "collections.OrderedDict")  # the last for a tensor's backward hooks, always empty
_DTYPES = {"torch.FloatStorage": "<f4", "torch.DoubleStorage": "<f8", "torch.HalfStorage": "<f2"}
_MOST_BLOCKS = 200
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's legacy files

Key = tuple[Any, ...]


@dataclass(frozen=True)
class DipgoGates(Published):
    """Gates by block key, bool ``[steps, blocks]``, and where they come from.

    The default model and sampler are those of the one file that was published.
    """

    keys: tuple[Key, ...]
    gates: np.ndarray
    source: str | None = None
    format = "DiP-GO gates"
    model = "sd-1.5"
    sampler = "ddim"

    @property
    def steps(self) -> int:
        return len(self.gates)

    @property
    def modules(self) -> list[str]:
        ups = sum(key[0] == "up" for key in self.keys)
        return [_module(key, ups) for key in self.keys]

    def sites(self, denoiser: nn.Module) -> str:
        return ",".join(self.modules)

    def columns(
        self, names: Sequence[str], denoiser: nn.Module, timesteps: Sequence[float]
    ) -> Mapping[str, np.ndarray]:
        rows = by_call(self.gates, timesteps, "the list of gates")
        return dict(zip(self.modules, rows.T, strict=True))

    def record(self, trace: Trace, gates: np.ndarray) -> dict[str, Any]:
        return {"source": self.source, "published_macs": published_cost(trace, gates)}


def published_cost(trace: Trace, gates: np.ndarray) -> Cost:
    """MACs as the paper counts them: layers only, each site by its gate, what lies outside of sites at every call.

    The SubNet's own cost also counts attention products, and nothing for a step that computes nothing.
    """
    from dipgo.graph.macs import layer_macs

    layers = layer_macs(trace)
    full = layers.full * len(gates)
    subnet = full - int((~gates @ np.array(layers.sites)).sum())
    return Cost(full=full, subnet=subnet, ratio=subnet / full)


def read_fact_sheet(document: Any) -> DipgoGates | None:
    """Read the JSON form; None where the document is something else.

    Raises:
        ValueError: rows of the wrong length, or keys of unknown blocks.
    """
    if not isinstance(document, dict) or not {"block_order", "keep"} <= document.keys():
        return None
    order, keep = document["block_order"], document["keep"]
    if not isinstance(order, list) or not isinstance(keep, list) or not keep:
        raise ValueError("'block_order' and 'keep' must be lists")
    wrong = next((step for step, row in enumerate(keep) if not is_mask(row) or len(row) != len(order)), None)
    if wrong is not None:
        raise ValueError(f"'keep' of step {wrong} is not a list of {len(order)} entries, 0 or 1")
    keys = tuple(tuple(int(part) if part.isdigit() else part for part in str(key).split("/")) for key in order)
    return _checked(keys, np.array(keep, bool), str(document.get("source", "")) or None)


def read_gates_pickle(data: bytes) -> DipgoGates:
    """Read the pickle; no code in it runs.

    Raises:
        ValueError: in one line, what is not as in a pickle of gates.
    """
    steps = read_pickle(io.BytesIO(data), _GLOBALS)
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) and step for step in steps):
        raise ValueError("the pickle is not a list of dicts, one per step")
    keys = tuple(steps[0])
    if len(steps) > MOST_CALLS or len(keys) > _MOST_BLOCKS:
        raise ValueError(f"the pickle has {len(steps)} steps of {len(keys)} blocks, more than any model")
    if not all(isinstance(key, tuple) for key in keys) or any(step.keys() != steps[0].keys() for step in steps):
        raise ValueError("the pickle's steps do not have the same blocks as keys")
    storage = cache(_storage)  # gates may share one
    return _checked(keys, np.array([[_gate(step[key], storage) for key in keys] for step in steps], bool))


def _checked(keys: tuple[Key, ...], gates: np.ndarray, source: str | None = None) -> DipgoGates:
    read = DipgoGates(keys, gates, source)
    if len(set(read.modules)) != len(keys):
        raise ValueError("two of its keys name the same block")
    return read


def _module(key: Key, ups: int) -> str:
    match key:
        case ("down", "block", int(depth), 0):
            return f"down_blocks.{depth}"
        case ("mid", "mid_block", 0, 0):
            return "mid_block"
        case ("up", "block", int(depth), 0) if depth < ups:
            return f"up_blocks.{ups - 1 - depth}"
    raise ValueError(
        f"{'/'.join(map(str, key))} is no block key; known: down/block/N/0, mid/mid_block/0/0, up/block/N/0"
    )


def _gate(tensor: Any, read: Callable[[bytes], np.ndarray]) -> bool:
    match tensor:
        case Call(name, (Call(inner, (bytes(payload),)), int(offset), (2,), (1,), *_)) if (name, inner) == (
            _TENSOR,
            _STORAGE,
        ):
            pair = read(payload)[max(offset, 0) : offset + 2].tolist()
        case _:
            raise ValueError("a gate in it is not a tensor of two values")
    if pair not in ([0, 1], [1, 0]):
        raise ValueError(f"a gate in it is {pair}; expected [0, 1] (compute) or [1, 0] (reuse)")
    return pair == [0, 1]


def _storage(payload: bytes) -> np.ndarray:
    """Read a storage as torch's legacy format writes it.

    Four pickles (magic number, protocol, system, what is stored), the list of the storages' keys, then for each its
    length (int64) and its elements.
    """
    stream = io.BytesIO(payload)
    magic, protocol, system = (read_pickle(stream, ()) for _ in range(3))
    stored = read_pickle(stream, _DTYPES)
    match read_pickle(stream, ()):
        case [str(own)]:
            pass
        case _:
            raise ValueError("a tensor's storage holds something else than one storage")
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("a tensor's storage is not in torch's legacy format, little-endian")
    match stored:
        case Call(name, (("storage", Name(kind), str(key), _, int(length), _),)) if name == PERSISTENT and key == own:
            dtype = np.dtype(_DTYPES[kind])
        case _:
            raise ValueError("a tensor's storage holds something else than one storage")
    count = stream.read(8)
    if int.from_bytes(count, "little") != length or len(payload) - stream.tell() != length * dtype.itemsize:
        raise ValueError("a tensor's storage is not as long as it says")
    return np.frombuffer(stream.read(), dtype)
