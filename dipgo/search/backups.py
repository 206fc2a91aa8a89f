"""Learned backups: what a skipped site serves, learned by gradient through the trajectory.

The weights are written as linear extrapolation, which follows the gates, plus a learned correction per step, site,
term and channel. The correction starts at zero, so learning starts from the extrapolating policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from dipgo.families import Conditions
from dipgo.gating import backup_name
from dipgo.search.policies import extrapolation
from dipgo.trace import Trace
from dipgo.trajectory import Batch, Trajectory


class Backups(nn.Module):
    """Backup weights for given gates.

    ``terms`` computed outputs are combined; ``by_channel`` learns one weight a channel, else one a site.
    """

    def __init__(self, trace: Trace, gates: np.ndarray, terms: int = 2, by_channel: bool = True) -> None:
        super().__init__()
        self.gates, self.terms = gates, terms
        channels = _channels(trace)
        start = extrapolation(trace, gates)
        computed_before = np.cumsum(gates, axis=0) - gates
        self.names: list[str] = []
        self.corrections = nn.ParameterList()
        for index, site in enumerate(trace.sites):
            valid = (~gates[:, index, None]) & (computed_before[:, index, None] > np.arange(terms))
            for output in range(len(trace.outputs[index])):
                name = backup_name(site.name, output)
                base = np.zeros((len(gates), terms, 1), np.float32)
                base[:, : min(2, terms), 0] = start[name][:, : min(2, terms)]
                if terms == 1:
                    base[:, 0, 0] = 1
                width = channels[index][output] if by_channel else 1
                number = len(self.names)
                self.names.append(name)
                self.register_buffer(f"base{number}", torch.from_numpy(base * valid[:, :, None]))
                self.register_buffer(f"valid{number}", torch.from_numpy(valid[:, :, None].astype(np.float32)))
                self.corrections.append(nn.Parameter(torch.zeros(len(gates), terms, width)))

    def forward(self) -> dict[str, torch.Tensor]:
        """Return the weights by backup name, ``[calls, K, channels]`` (or ``[calls, K, 1]``)."""
        return {
            name: getattr(self, f"base{number}") + getattr(self, f"valid{number}") * correction
            for number, (name, correction) in enumerate(zip(self.names, self.corrections, strict=True))
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights as a SubNet holds them."""
        with torch.no_grad():
            return {
                name: (weights[:, :, 0] if weights.shape[2] == 1 else weights).contiguous().numpy().copy()
                for name, weights in self().items()
            }


def _channels(trace: Trace) -> list[list[int]]:
    return [
        [trace.shape(name, 1)[site.channel_axis] for name in names]
        for site, names in zip(trace.sites, trace.outputs, strict=True)
    ]


def learn_backups(
    backups: Backups,
    trajectory: Trajectory,
    batches: Iterator[tuple[Batch, list[torch.Tensor]]],
    iterations: int,
    rate: float,
    loss_of: Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor],
    after: Callable[[int, float], None] = lambda iteration, loss: None,
) -> None:
    """Learn the corrections with Adam and a cosine schedule; ``batches`` yields noise with its full trajectory."""
    optimiser = torch.optim.Adam(backups.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for iteration in range(iterations):
        batch, target = next(batches)
        latents = trajectory.gated(batch.noise, batch.conditions, backups.gates, backups(), backups.terms)
        loss = loss_of(latents, target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        after(iteration, loss.item())


def select(conditions: Conditions, picks: torch.Tensor, count: int) -> Conditions:
    """Return the rows ``picks`` of conditions that hold one or two halves of ``count`` rows."""
    return {name: torch.cat([half[picks] for half in value.split(count)]) for name, value in conditions.items()}
