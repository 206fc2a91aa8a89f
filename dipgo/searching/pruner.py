"""The pruner network (paper, section 3.2): queries for every gate, self-attention over them, prediction heads."""

from __future__ import annotations

import torch
from torch import nn

ATTENTION = {"step": ("step",), "site": ("site",), "both": ("step", "site")}


class Pruner(nn.Module):
    """Predicts for every step and site the probability to keep it.

    Queries ``[steps x sites, D]`` pass a transformer encoder that attends within a step (``attention="step"``), over
    the steps of a site (``"site"``), or ``"both"`` in turn, then one small head per gate with two logits and a
    softmax. Defaults are the paper's: D = 512, one layer, within a step. At the start the last linear of each head is
    zero and its bias says to keep, so the first SubNet keeps everything, as in the paper.

    The public code discards its encoder's output, so there the attention has no effect; here gradient reaches every
    parameter once the heads have left zero.

    Args:
        width: D.
        layers: of the encoder; with ``"both"`` each is two, one a direction.
        heads: of the attention; they divide D.
        hidden: width of the feed-forward layers and of the prediction heads.
    """

    def __init__(
        self,
        steps: int,
        sites: int,
        width: int = 512,
        layers: int = 1,
        heads: int = 1,
        hidden: int = 128,
        attention: str = "step",
    ) -> None:
        super().__init__()
        self.steps, self.sites, self.attention = steps, sites, attention
        self.queries = nn.Parameter(torch.randn(steps, sites, width))
        self.scopes = ATTENTION[attention] * layers
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, dim_feedforward=hidden, dropout=0.0, batch_first=True)
            for _ in self.scopes
        )
        gates = steps * sites
        self.first = _PerGateLinear(gates, width, hidden)
        self.second = _PerGateLinear(gates, hidden, hidden)
        self.last = _PerGateLinear(gates, hidden, 2)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self) -> torch.Tensor:
        """Return the probability to keep, ``[steps, sites]``."""
        encoded = self.queries
        for scope, layer in zip(self.scopes, self.encoder, strict=True):
            encoded = layer(encoded) if scope == "step" else layer(encoded.transpose(0, 1)).transpose(0, 1)
        hidden = encoded.reshape(self.steps * self.sites, -1)
        hidden = self.second(self.first(hidden).relu()).relu()
        return self.last(hidden).softmax(dim=-1)[:, 1].view(self.steps, self.sites)


class _PerGateLinear(nn.Module):
    """One linear map a gate: ``[gates, inputs]`` to ``[gates, outputs]``."""

    def __init__(self, gates: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(gates, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(gates, outputs).uniform_(-bound, bound))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.einsum("gi,gio->go", values, self.weight) + self.bias


def straight_through(keep: torch.Tensor, hard: torch.Tensor) -> torch.Tensor:
    """Return ``hard`` in value and ``keep`` in gradient."""
    return hard + keep - keep.detach()
