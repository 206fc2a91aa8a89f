"""Sites: the modules of a denoiser that may be skipped, chosen by name patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dipgo.errors import UsageError

if TYPE_CHECKING:  # the runtime reads SubNets without torch
    from torch import nn

    from dipgo.families import Family


@dataclass(frozen=True)
class Site:
    """A module that may be skipped.

    Attributes:
        name: its dotted name inside the denoiser.
        macs: multiply-accumulates inside it for one denoiser call at batch 1 of images (guidance doubles it).
        params: number of parameters inside it.
        channel_axis: axis of its outputs along which a backup may hold one weight a channel.
    """

    name: str
    macs: int
    params: int
    channel_axis: int


def site_names(denoiser: nn.Module, family: Family, spec: str | None) -> list[str]:
    """Return the names of the sites that ``spec`` chooses, in the order of the model's definition.

    ``spec`` is a granularity of the family, or patterns joined by commas, or None for the family's default. In a
    pattern ``*`` stands for one part of a dotted name: ``transformer_blocks.*.attn1``.

    Raises:
        UsageError: a pattern matches no module, or one chosen site lies inside another.
    """
    spec = spec or family.granularity
    patterns = family.sites.get(spec) or [part.strip() for part in spec.split(",") if part.strip()]
    names = [name for name, _ in denoiser.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        matches = [name for name in names if expression.fullmatch(name)]
        if not matches:
            raise UsageError(
                f"site pattern '{pattern}' matches no module of {family.denoiser_class}; use one of "
                f"{', '.join(family.sites)}, or module names such as '{names[len(names) // 2]}'"
            )
        chosen.update(matches)
    ordered = [name for name in names if name in chosen]
    for name in ordered:
        parents = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        outer = next((parent for parent in parents if parent in chosen), None)
        if outer:
            raise UsageError(f"site '{name}' lies inside site '{outer}'; choose patterns that do not nest")
    return ordered
