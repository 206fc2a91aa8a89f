"""Learned backups: what a skipped site serves, learned by gradient through the trajectory.

The weights are written as what they start from, such as linear extrapolation, plus a learned correction per step, site,
cached output, pass of guidance and channel. The correction starts at zero, so learning starts from a fixed schedule.

Two things halve the iterations that this takes, for an optimiser that scales each parameter alone. Neighbouring outputs
are nearly parallel, so the gradients of their two weights nearly agree, and one would hardly move against the other:
what is learned is the gain on the newest output and the slope along its difference to the one before. And what all
channels of a site have in common is a parameter of its own, since its gradient is the least noisy.

The passes of guidance move apart by a contrast. Guidance multiplies by its scale what they differ by, so that its
gradient is large and a step of it weighs heavily: it moves a quarter as fast.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from dipgo.graph.trace import Trace
from dipgo.schedule.fixed_schedules import extrapolation
from dipgo.schedule.schedule import Schedule, backup_outputs, cached
from dipgo.searching.training_loop import Training, optimise

CONTRAST = 0.25


class Backups(nn.Module):
    """Backup weights for the gates of a schedule.

    Args:
        start: gates, and weights to begin with: linear extrapolation where it has none, and the last output where it
            combines more outputs than ``history``.
        history: K, how many cached outputs are combined.
        by_channel: learn one weight a channel, else one a site.
        by_pass: learn one for either pass of guidance, where there is guidance, else the same for both.
    """

    sign: torch.Tensor
    basis: torch.Tensor

    def __init__(
        self, trace: Trace, start: Schedule, history: int = 2, by_channel: bool = True, by_pass: bool = True
    ) -> None:
        super().__init__()
        self.gates = start.gates
        weights = start.backups or extrapolation(trace, start.gates).backups
        widths, passes = channels(trace), guidance_passes(trace)
        served = (~start.gates)[:, :, None] & cached(start.gates, history)
        self.names: list[str] = []
        self.shared = nn.ModuleList()  # for each: what its channels have in common, then each channel's own
        self.contrasts = nn.ModuleList()  # the same again, of what the passes differ by
        for number, (name, site, _) in enumerate(backup_outputs(trace)):
            valid = served[:, site, :, None, None]
            self.names.append(name)
            base = _base(weights[name], history) * valid
            self.register_buffer(f"base{number}", torch.from_numpy(base))
            self.register_buffer(f"valid{number}", torch.from_numpy(valid.astype(np.float32)))
            parts = [(len(self.gates), history, 1, width) for width in ([1, widths[name]] if by_channel else [1])]
            self.shared.append(nn.ParameterList(torch.zeros(part) for part in parts))
            apart = parts if by_pass and passes[name] == 2 else []
            self.contrasts.append(nn.ParameterList(torch.zeros(part) for part in apart))
        self.register_buffer("basis", _basis(history))
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

    def schedule(self) -> Schedule:
        """Return the gates with the weights as they are now."""
        with torch.no_grad():
            backups = {
                name: (weights[:, :, 0] if weights.shape[2:] == (1,) else weights).contiguous().numpy().copy()
                for name, weights in self().items()
            }
        return Schedule(self.gates, backups)


def _sum(parts: nn.Module) -> torch.Tensor:
    first, *rest = parts.parameters()
    return sum(rest, first)


def _basis(history: int) -> torch.Tensor:
    """Return the weights that one unit of gain, slope, … stands for: float ``[history, history]``.

    Row k is the k-th backward difference of the outputs, newest first. The slope's is the longest: where steps lie far
    apart it has a wider range than the gain, and so it moves four times as fast.
    """
    rows = [[(-1.0) ** j * math.comb(k, j) for j in range(history)] for k in range(history)]
    return torch.tensor(rows) * torch.tensor([2.0 if k == 1 else 0.5 for k in range(history)])[:, None]


def _base(start: np.ndarray, history: int) -> np.ndarray:
    """Return the weights to begin with: float32 ``[calls, history, 1 or 2, channels or 1]``."""
    calls, own = start.shape[:2]
    weights = start.reshape(calls, own, *[1] * (4 - start.ndim), *start.shape[2:])
    base = np.zeros((calls, history, *weights.shape[2:]), np.float32)
    if own <= history:
        base[:, :own] = weights
    else:
        base[:, 0] = 1
    return base


def channels(trace: Trace) -> dict[str, int]:
    """Return how many channels each output of each site has, by backup name."""
    return {name: trace.shape(node, 1)[trace.sites[site].channel_axis] for name, site, node in backup_outputs(trace)}


def guidance_passes(trace: Trace) -> dict[str, int]:
    """Return how many passes of guidance each output of each site has along its batch, 2 or 1, by backup name."""
    return {name: 2 if trace.shapes[node][0] == (2, 2) else 1 for name, _, node in backup_outputs(trace)}


def learn_backups(backups: Backups, training: Training, share: float | None = None) -> None:
    """Learn the corrections by gradient through the gated trajectory; ``share`` is of the costs, to report."""
    figures, trajectory = {} if share is None else {"kept": share}, training.trajectory

    def loss_at(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch, target = training.batches[number]
        latents = trajectory.gated(batch.noise, batch.conditions, backups.gates, backups())
        return training.loss(latents, target), figures

    optimise(backups, loss_at, training.descent, training.phase, trajectory.device, trajectory.precision)
