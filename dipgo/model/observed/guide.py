"""Guidance, as a pipeline makes one output of the conditional and the unconditional pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dipgo.base.errors import UsageError
from dipgo.base.guidance import rescale_of
from dipgo.base.records import Passes
from dipgo.model.guidance import Number, rescaled

_RESIDUAL = 1e-4  # relative, of an output in float32


@dataclass(frozen=True)
class Guide:
    """How the outputs of a step become what the scheduler is given.

    Attributes:
        kind: ``none``: one pass; ``linear``: u + s (c - u); ``norm``: that with the norm of c along the last axis
            (Qwen-Image and Lumina 2); ``perturbed``: ``linear``, and :attr:`perturbed` times c - p, with p of a third
            pass: the conditional one under other attention (PAG).
        sign: -1 where the pipeline turns outputs around.
        offset: what is added to the guidance scale for s; 1 where guidance is c + scale (c - u).
        batched: whether both passes are one call; else one each.
        conditional: which of the two is the conditional one.
    """

    kind: Literal["none", "linear", "norm", "perturbed"]
    sign: int = 1
    offset: float = 0.0
    batched: bool = False
    conditional: int = 0
    perturbed: float = 0.0

    @property
    def record(self) -> Passes:
        separate = self.kind != "none" and not self.batched
        return Passes(conditional_first=self.kind != "none" and self.conditional == 0, calls=2 if separate else 1)

    @property
    def passes(self) -> int:
        return {"none": 1, "perturbed": 3}.get(self.kind, 2)

    @property
    def rows(self) -> int:
        """Rows of conditions per image: a perturbed pass has those of the conditional one."""
        return min(self.passes, 2)

    @property
    def neutral(self) -> float:
        """The guidance scale at which the guided output is the conditional one."""
        return 1.0 - self.offset

    def combine(
        self,
        unconditional: torch.Tensor,
        conditional: torch.Tensor,
        scale: Number,
        rescale: Number = 0.0,
        perturbed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the guided output of all passes, turned around already."""
        guided = unconditional + (scale + self.offset) * (conditional - unconditional)
        if perturbed is not None:
            guided = guided + self.perturbed * (conditional - perturbed)
        if self.kind == "norm":
            lengths = [torch.norm(each, dim=-1, keepdim=True) for each in (conditional, guided)]
            return guided * (lengths[0] / lengths[1])
        return rescaled(guided, conditional, rescale)


def fit_guide(outputs: Sequence[torch.Tensor], given: torch.Tensor, scale: float) -> Guide:
    """Return the guide that makes ``given``, for the scheduler, of the outputs of a step's calls.

    Raises:
        UsageError: none of those that are known.
    """
    rows = len(given)
    width = given.shape[1]
    cut = [output[:, :width].float() for output in outputs]
    given = given.float()
    if len(cut) == 1 and len(cut[0]) == rows:
        for sign in (1, -1):
            if _near(sign * cut[0], given):
                return Guide("none", sign)
    if len(cut) == 1 and len(cut[0]) == 3 * rows:
        u, c, p = cut[0].chunk(3)
        return _fit_perturbed(u, c, p, given, scale)
    passes, batched = (list(cut[0].chunk(2)), True) if len(cut) == 1 else (cut, False)
    if len(passes) != 2 or any(each.shape != given.shape for each in passes):
        count = sum(len(each) for each in cut) // rows
        if count <= 2:
            raise UsageError("it gives its scheduler something else than its denoiser makes, or a part of it")
        raise UsageError(f"it makes {count} passes of guidance per step, and one or two are supported")
    for conditional in (0, 1):
        for sign in (1, -1):
            c, u = sign * passes[conditional], sign * passes[1 - conditional]
            slope = float(((given - u) * (c - u)).sum() / ((c - u) ** 2).sum())
            for offset in dict.fromkeys(
                (0.0, 1.0, float(round(slope - scale)))
            ):  # the slope of rescaled passes is another
                for kind in ("linear", "norm"):
                    guide = Guide(kind, sign, offset, batched, conditional)
                    if slope > 0 and _near(guide.combine(u, c, float(scale), rescale_of(scale)), given):
                        return guide
    raise UsageError("it combines its passes of guidance in a way of its own")


def _fit_perturbed(u: torch.Tensor, c: torch.Tensor, p: torch.Tensor, given: torch.Tensor, scale: float) -> Guide:
    rest = given - (u + float(scale) * (c - u))
    share = float((rest * (c - p)).sum() / ((c - p) ** 2).sum())
    for digits in (2, 3, 4):  # the roundest, which every step gives
        guide = Guide("perturbed", batched=True, conditional=1, perturbed=float(f"{share:.{digits}g}"))
        if _near(guide.combine(u, c, float(scale), rescale_of(scale), p), given):
            return guide
    raise UsageError("it combines its three passes of guidance in a way of its own")


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(torch.linalg.norm(one - other) <= _RESIDUAL * torch.linalg.norm(other))
