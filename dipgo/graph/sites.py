"""Sites: the modules of a denoiser that may be skipped, chosen by name patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dipgo.base.errors import UsageError

if TYPE_CHECKING:  # the runtime reads SubNets without torch
    from torch import nn

    from dipgo.model.families import Family


@dataclass(frozen=True)
class Site:
    """A module that may be skipped.

    Attributes:
        name: its dotted name inside the denoiser.
        macs: multiply-accumulates that go when it alone is skipped, those inside it and those that feed nothing else,
            for one denoiser call at batch 1 of images (guidance doubles it).
        params: number of parameters that go with them.
        channel_axis: axis of its outputs along which a backup may hold one weight a channel.
    """

    name: str
    macs: int
    params: int
    channel_axis: int


def site_names(denoiser: nn.Module, family: Family, spec: str | None) -> list[str]:
    """Return the names of the sites that ``spec`` chooses, in the order of the model's definition.

    ``spec`` is a granularity of the family, or patterns joined by commas, or None for the family's default. In a
    pattern ``*`` stands for any characters inside one part of a dotted name (``transformer_blocks.*.attn1``), and
    ``a|b`` as a part for a, or for b where there is no a (``up_blocks.*.attentions|resnets.*``: the resnets that no
    transformer follows).

    Raises:
        UsageError: a pattern matches no module, one chosen site lies inside another, or no patterns are given for a
            family that has none.
    """
    names = [name for name, _ in denoiser.named_modules() if name]
    such_as = f"module names such as '{names[len(names) // 2]}'"
    spec = spec or family.granularity
    if spec is None:
        raise UsageError(f"{family.denoiser_class} has no sites of its own; give --sites as patterns, of {such_as}")
    registered = family.sites.get(spec)
    chosen: set[str] = set()
    for pattern in registered or [part.strip() for part in spec.split(",") if part.strip()]:
        matches = _matches(pattern, names)
        if not matches and not registered:  # a registered pattern may ask for what a small model lacks
            known = f"{', '.join(family.sites)}, or " if family.sites else ""
            raise UsageError(
                f"site pattern '{pattern}' matches no module of {family.denoiser_class}; use one of {known}{such_as}"
            )
        chosen.update(matches)
    ordered = [name for name in names if name in chosen]
    for name in ordered:
        parents = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        outer = next((parent for parent in parents if parent in chosen), None)
        if outer:
            raise UsageError(f"site '{name}' lies inside site '{outer}'; choose patterns that do not nest")
    return ordered


def _matches(pattern: str, names: list[str]) -> list[str]:
    """Return the names that a pattern matches; of those that differ in an alternative alone, the one named first."""
    parts = [
        [re.compile(re.escape(choice).replace(r"\*", r"[^.]+")) for choice in part.split("|")]
        for part in pattern.split(".")
    ]
    best: dict[tuple[str, ...], tuple[list[int], str]] = {}
    for name in names:
        words = name.split(".")
        if len(words) != len(parts):
            continue
        ranks = [
            next((rank for rank, choice in enumerate(choices) if choice.fullmatch(word)), -1)
            for word, choices in zip(words, parts, strict=True)
        ]
        if min(ranks) < 0:
            continue
        place = tuple("|" if len(choices) > 1 else word for word, choices in zip(words, parts, strict=True))
        best[place] = min(best.get(place, (ranks, name)), (ranks, name))
    return [name for _, name in best.values()]
