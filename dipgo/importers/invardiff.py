"""InvarDiff (2025): its cache books, which say by step and by module what is reused; true reuses.

A book for DiT holds ``step_cache_book`` ``[steps]``, ``msa_cache_book`` and ``mlp_cache_book`` ``[steps][blocks]``;
one for FLUX holds ``step_cache_book``, ``transformer_cache_book`` with ``attn``, ``context_attn``, ``ff`` and
``context_ff``, and ``single_transformer_cache_book`` with ``attn`` and ``mlp``.

A step that is reused serves the last block's output and computes the head alone. Here the site is the norm that reads
this output and nothing else: its output kept is the same thing. Attention of a double block is one module with two
outputs, which InvarDiff reuses where the book says so of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo.importers.published import Published, by_call

if TYPE_CHECKING:
    from torch import nn

_STEPS = "step_cache_book"
_DIT = {"msa_cache_book": "attn1", "mlp_cache_book": "ff"}
_DOUBLE = {"attn": "attn", "ff": "ff", "context_ff": "ff_context"}
_SINGLE = {"attn": "attn", "mlp": "act_mlp"}


@dataclass(frozen=True)
class InvarDiff(Published):
    """What is computed: ``whole`` bool ``[steps]``, and bool ``[steps, blocks]`` by list of blocks and layer in them.

    ``last`` is the module that stands for the whole step.
    """

    whole: np.ndarray
    layers: Mapping[tuple[str, str], np.ndarray]
    last: str
    format = "InvarDiff"

    @property
    def steps(self) -> int:
        return len(self.whole)

    def sites(self, denoiser: nn.Module) -> str:
        return ",".join([*(f"{blocks}.*.{layer}" for blocks, layer in self.layers), self.last])

    def columns(
        self, names: Sequence[str], denoiser: nn.Module, timesteps: Sequence[float]
    ) -> Mapping[str, np.ndarray]:
        modules = {name for name, _ in denoiser.named_modules()}
        found = {self.last: self.whole}
        for (blocks, layer), book in self.layers.items():
            count = len(getattr(denoiser, blocks, ()))
            if count != book.shape[1] or f"{blocks}.0.{layer}" not in modules:
                raise ValueError(
                    f"it is for {book.shape[1]} '{blocks}' with '{layer}', and {type(denoiser).__name__} has {count}; "
                    f"give the --model it is for"
                )
            found |= {f"{blocks}.{block}.{layer}": book[:, block] & self.whole for block in range(count)}
        return {name: by_call(column, timesteps, f"'{_STEPS}'") for name, column in found.items()}


def read_invardiff(document: Any) -> InvarDiff | None:
    """Read a cache book; None where the document is something else.

    Raises:
        ValueError: a book of another model than DiT and FLUX, or lists that are not bool of one shape.
    """
    if not isinstance(document, dict) or _STEPS not in document:
        return None
    reused = _book(document, _STEPS, 1)
    if document.keys() >= _DIT.keys():
        books = {("transformer_blocks", layer): _book(document, key, 2) for key, layer in _DIT.items()}
        last = "norm_out"
    elif isinstance(document.get("transformer_cache_book"), dict):
        double, single = document["transformer_cache_book"], document.get("single_transformer_cache_book")
        books = {("transformer_blocks", layer): _book(double, key, 2) for key, layer in _DOUBLE.items()}
        if "context_attn" in double:
            books["transformer_blocks", "attn"] &= _book(double, "context_attn", 2)
        books |= {("single_transformer_blocks", layer): _book(single, key, 2) for key, layer in _SINGLE.items()}
        last = "norm_out.norm"
    else:
        raise ValueError("an InvarDiff book of another model; those for DiT and FLUX are read")
    if any(len(book) != len(reused) for book in books.values()):
        raise ValueError(f"its books have other numbers of steps than '{_STEPS}', {len(reused)}")
    return InvarDiff(~reused, {key: ~book for key, book in books.items()}, last)


def _book(books: Any, name: str, depth: int) -> np.ndarray:
    """Return lists of true and false as a bool array of ``depth`` axes."""
    value = books.get(name) if isinstance(books, dict) else None
    rows: Iterable[Any] = value if depth == 2 and isinstance(value, list) else [value]
    lists = [row for row in rows if isinstance(row, list) and row and all(type(entry) is bool for entry in row)]
    if not value or len(lists) != len(list(rows)) or len({len(row) for row in lists}) > 1:
        shape = "[steps][blocks]" if depth == 2 else "[steps]"
        raise ValueError(f"an InvarDiff book whose '{name}' is no {shape} of true and false")
    return np.array(lists if depth == 2 else lists[0], bool)
