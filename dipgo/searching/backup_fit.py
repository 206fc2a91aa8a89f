"""Learned backups: what a skipped site serves, learned by gradient through the trajectory.

The weights are written as what they start from, such as linear extrapolation, plus a learned correction per step, site,
term, half of guidance and channel. The correction starts at zero, so learning starts from a policy.

Two things halve the iterations that this takes, for an optimiser that scales each parameter alone. Neighbouring outputs
are nearly parallel, so the gradients of their two weights nearly agree, and one would hardly move against the other:
what is learned is the gain on the newest output and the slope along its difference to the one before. And what all
channels of a site have in common is a parameter of its own, since its gradient is the least noisy.

The halves of guidance move apart by a contrast. Guidance multiplies by its scale what they differ by, so that its
gradient is large and a step of it weighs heavily: it moves a quarter as fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from dipgo.eager.trajectory import Trajectory
from dipgo.graph.trace import Trace
from dipgo.schedule.backup_names import backup_name
from dipgo.schedule.policies import extrapolation
from dipgo.searching.losses import Loss
from dipgo.searching.run_folder import Phase
from dipgo.searching.task import Batches
from dipgo.searching.training_loop import Descent, optimise

CONTRAST = 0.25


class Backups(nn.Module):
    """Backup weights for given gates.

    ``terms`` computed outputs are combined. ``by_channel`` learns one weight a channel, else one a site; ``by_half``
    one for either half of guidance, where there is guidance, else the same for both. ``start`` is what to begin with by
    backup name, shaped as in a SubNet; linear extrapolation where it is left out, and the last output where that has
    more terms than are combined.
    """

    sign: torch.Tensor
    basis: torch.Tensor

    def __init__(
        self,
        trace: Trace,
        gates: np.ndarray,
        terms: int = 2,
        by_channel: bool = True,
        by_half: bool = True,
        start: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        super().__init__()
        self.gates, self.terms = gates, terms
        widths, rows = channels(trace), halves(trace)
        start = start or extrapolation(trace, gates)
        computed_before = np.cumsum(gates, axis=0) - gates
        self.names: list[str] = []
        self.shared = nn.ModuleList()  # for each: what its channels have in common, then each channel's own
        self.contrasts = nn.ModuleList()  # the same again, of what the halves differ by
        for index, site in enumerate(trace.sites):
            valid = (~gates[:, index, None]) & (computed_before[:, index, None] > np.arange(terms))
            for output in range(len(trace.outputs[index])):
                name = backup_name(site.name, output)
                number = len(self.names)
                self.names.append(name)
                base = _begun(start[name], terms) * valid[:, :, None, None]
                self.register_buffer(f"base{number}", torch.from_numpy(base))
                self.register_buffer(f"valid{number}", torch.from_numpy(valid[:, :, None, None].astype(np.float32)))
                parts = [(len(gates), terms, 1, width) for width in ([1, widths[name]] if by_channel else [1])]
                self.shared.append(nn.ParameterList(torch.zeros(part) for part in parts))
                apart = parts if by_half and rows[name] == 2 else []
                self.contrasts.append(nn.ParameterList(torch.zeros(part) for part in apart))
        self.register_buffer("basis", _basis(terms))
        self.register_buffer("sign", torch.tensor([[-CONTRAST], [CONTRAST]]))

    def forward(self) -> dict[str, torch.Tensor]:
        """Return the weights by backup name, ``[calls, K, channels]`` or ``[calls, K, 2, channels]``.

        There is one channel where all have the same weight.
        """
        weights = {}
        for number, name in enumerate(self.names):
            correction = _sum(self.shared[number])
            if [*self.contrasts[number].parameters()]:
                correction = correction + self.sign * _sum(self.contrasts[number])
            correction = getattr(self, f"valid{number}") * correction
            both = getattr(self, f"base{number}") + torch.einsum("skhc,kj->sjhc", correction, self.basis)
            weights[name] = both if both.shape[2] == 2 else both[:, :, 0]
        return weights

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights as a SubNet holds them."""
        with torch.no_grad():
            return {
                name: (weights[:, :, 0] if weights.shape[2:] == (1,) else weights).contiguous().numpy().copy()
                for name, weights in self().items()
            }


def _sum(parts: nn.Module) -> torch.Tensor:
    first, *rest = parts.parameters()
    return sum(rest, first)


def _basis(terms: int) -> torch.Tensor:
    """Return the weights that one unit of gain, slope, … stands for: float ``[terms, terms]``.

    Row k is the k-th backward difference of the outputs, newest first. The slope's is the longest: where steps lie far
    apart it has a wider range than the gain, and so it moves four times as fast.
    """
    rows = [[(-1.0) ** j * math.comb(k, j) for j in range(terms)] for k in range(terms)]
    return torch.tensor(rows) * torch.tensor([2.0 if k == 1 else 0.5 for k in range(terms)])[:, None]


def _begun(start: np.ndarray, terms: int) -> np.ndarray:
    """Return the weights to begin with for ``terms`` outputs: float32 ``[calls, terms, 1 or 2, channels or 1]``."""
    calls, given = start.shape[:2]
    weights = start.reshape(calls, given, *[1] * (4 - start.ndim), *start.shape[2:])
    base = np.zeros((calls, terms, *weights.shape[2:]), np.float32)
    if given <= terms:
        base[:, :given] = weights
    else:
        base[:, 0] = 1
    return base


def channels(trace: Trace) -> dict[str, int]:
    """Return how many channels each output of each site has, by backup name."""
    return {
        backup_name(site.name, output): trace.shape(name, 1)[site.channel_axis]
        for site, names in zip(trace.sites, trace.outputs, strict=True)
        for output, name in enumerate(names)
    }


def halves(trace: Trace) -> dict[str, int]:
    """Return how many halves of guidance each output of each site has along its batch, 2 or 1, by backup name."""
    return {
        backup_name(site.name, output): 2 if trace.shapes[name][0] == (2, 2) else 1
        for site, names in zip(trace.sites, trace.outputs, strict=True)
        for output, name in enumerate(names)
    }


def learn_backups(
    backups: Backups,
    trajectory: Trajectory,
    batches: Batches,
    descent: Descent,
    loss_of: Loss,
    phase: Phase,
    kept: float | None = None,
) -> None:
    """Learn the corrections by gradient through the gated trajectory; ``kept`` is the ratio of MACs, to report."""
    figures = {} if kept is None else {"kept": kept}

    def loss_at(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch, target = batches[number]
        latents = trajectory.gated(batch.noise, batch.conditions, backups.gates, backups(), backups.terms)
        return loss_of(latents, target), figures

    optimise(backups, loss_at, descent, trajectory, phase)
