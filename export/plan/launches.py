"""What a program is made of while it is compiled: launches of graphs that hand values to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Value = tuple[str, int]
"""A value at run time: its name in the traced graph, and the step that computed it.

``latent`` of step k is x before that step; of the step after the last it is the result.
"""

LATENT, EPSILON = "latent", "epsilon"

MATRICES = "lora."  # how inputs begin that hold the matrices of low-rank branches


@dataclass(frozen=True)
class Launch:
    """One launch of a graph at a step; ``reads`` and ``writes`` give the values of inputs and outputs by name."""

    step: int
    graph: str
    reads: Mapping[str, Value]
    writes: Mapping[str, Value]
