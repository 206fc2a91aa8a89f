"""The denoising loop with nothing to decide while it runs: which step launches what is laid down beforehand.

It is plain torch without control flow on values, so it runs as it is, and it can be captured whole as a CUDA graph.
Silent steps launch nothing: they are part of the solver's update (:mod:`export.plan.solver`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from dipgo.base.errors import DipgoError
from dipgo.graph.liveness import StepPlan, plan
from dipgo.graph.trace import Trace
from dipgo.model.families import Conditions
from dipgo.model.sampler import Sampler
from dipgo.schedule.backup_names import backup_name
from dipgo.schedule.cost import is_silent
from dipgo.schedule.subnet import SubNet
from export.plan.solver import Recurrence, recurrence

Step = Callable[..., tuple[torch.Tensor, Sequence[torch.Tensor]]]
"""``(latent, timestep [B], *conditions, *pasts) -> (ε, stored outputs)``, as :func:`benchmarks.gpu.cut.cut` makes."""


@dataclass(frozen=True)
class Signature:
    """What a kind of step runs: computed sites, served sites and stored sites, in order."""

    computed: tuple[int, ...]
    served: tuple[int, ...]
    stored: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """A step that runs.

    Attributes:
        call: which call of the trajectory it is.
        reads: the served sites, each with the calls whose outputs it combines, newest first, K of them.
        forgets: (call, site) of outputs that no later launch reads.
    """

    call: int
    signature: Signature
    reads: dict[int, tuple[int, ...]]
    forgets: frozenset[tuple[int, int]]


def lay_out(trace: Trace, subnet: SubNet) -> list[Launch]:
    """Return the launches of a SubNet whose gates are canonical.

    Launches of one row of gates share a signature: what any of them stores, all hand out. A site with fewer than K
    computed outputs repeats the oldest; its weight there is zero.
    """
    learned = bool(subnet.weights)
    plans = plan(subnet.gates, subnet.terms, trace.live_sites)
    calls = [call for call in range(subnet.calls) if call == 0 or not is_silent(trace, subnet.gates[call], learned)]
    stored: dict[bytes, set[int]] = {}
    for call in calls:
        stored.setdefault(subnet.gates[call].tobytes(), set()).update(plans[call].stored)
    reads = {call: _padded(plans[call], subnet.terms) for call in calls}
    last = {(source, site): call for call in calls for site, sources in reads[call].items() for source in sources}
    launches = []
    for call in calls:
        signature = Signature(
            computed=tuple(np.flatnonzero(subnet.gates[call]).tolist()),
            served=tuple(reads[call]),
            stored=tuple(sorted(stored[subnet.gates[call].tobytes()])),
        )
        gone = frozenset(key for key, reader in last.items() if reader == call)
        unread = frozenset((call, site) for site in signature.stored if (call, site) not in last)
        launches.append(Launch(call, signature, reads[call], gone | unread))
    return launches


def _padded(entry: StepPlan, terms: int) -> dict[int, tuple[int, ...]]:
    return {site: (*past, *past[-1:] * (terms - len(past))) for site, past in sorted(entry.served.items())}


class Loop:
    """A trajectory on one device: ``loop(noise [B, C, H, W] float32, conditions)`` returns the final latent.

    Raises DipgoError where the sampler needs a longer memory than graphs are given.
    """

    def __init__(
        self,
        trace: Trace,
        subnet: SubNet,
        sampler: Sampler,
        launches: Sequence[Launch],
        steps: Mapping[Signature, Step],
        batch: int,
        device: torch.device,
    ) -> None:
        found = recurrence(sampler, [launch.call for launch in launches])
        if found is None:
            raise DipgoError(f"{sampler.name} needs more than a short memory; choose another sampler")
        self.launches, self.steps, self.solver, self.sampler = launches, steps, found, sampler
        self.timesteps = [
            torch.full((batch,), sampler.timesteps[launch.call], dtype=torch.float32, device=device)
            for launch in launches
        ]
        self.outputs = [len(names) for names in trace.outputs]
        self.weights = _weights(trace, subnet, device)

    def __call__(self, noise: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        given = pytree.tree_leaves(conditions)
        cache: dict[tuple[int, int], Sequence[torch.Tensor]] = {}
        latents, epsilons = [noise * float(self.sampler.rows[0, 0])], list[torch.Tensor]()
        for number, launch in enumerate(self.launches):
            scaled = latents[0] * float(self.sampler.input_scale[launch.call])
            pasts = [value for site in launch.reads for value in self._past(launch, site, cache)]
            epsilon, fresh = self.steps[launch.signature](scaled, self.timesteps[number], *given, *pasts)
            position = 0
            for site in launch.signature.stored:
                cache[launch.call, site] = fresh[position : position + self.outputs[site]]
                position += self.outputs[site]
            for key in launch.forgets:
                del cache[key]
            history = self.solver.history
            epsilons = [epsilon, *epsilons][:history]
            latents = [advance(self.solver, number, latents, epsilons), *latents][:history]
        return latents[0]

    def _past(
        self, launch: Launch, site: int, cache: Mapping[tuple[int, int], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        values: list[torch.Tensor] = []
        for output in range(self.outputs[site]):
            values += [cache[source, site][output] for source in launch.reads[site]]
            if self.weights:
                values.append(self.weights[site][output][launch.call])
        return values


def advance(
    solver: Recurrence, launch: int, latents: Sequence[torch.Tensor], epsilons: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the latent after a launch from the last ones and the last ε, newest first."""
    total: torch.Tensor | None = None
    for coefficients, values in ((solver.latents[launch], latents), (solver.outputs[launch], epsilons)):
        for coefficient, value in zip(coefficients.tolist(), values, strict=False):
            if coefficient:
                total = value * coefficient if total is None else total.add(value, alpha=coefficient)
    assert total is not None
    return total


def _weights(trace: Trace, subnet: SubNet, device: torch.device) -> list[list[torch.Tensor]]:
    """Return the backups' weights by site and output, ``[calls, K, …]`` in the trace's dtype; empty without any."""
    if not subnet.weights:
        return []
    before = np.cumsum(subnet.gates, axis=0) - subnet.gates  # computed outputs at hand
    tables: list[list[torch.Tensor]] = []
    for index, site in enumerate(trace.sites):
        tables.append([])
        for output in range(len(trace.outputs[index])):
            array = subnet.weights[backup_name(site.name, output)].copy()
            for term in range(subnet.terms):
                array[before[:, index] <= term, term] = 0
            tables[-1].append(torch.from_numpy(array).to(device, trace.dtype))
    return tables


def captured(loop: Callable[[torch.Tensor, Conditions], torch.Tensor], noise: Any, conditions: Conditions) -> Any:
    """Return ``loop`` as one CUDA graph, with the same arguments; its result is overwritten by the next call.

    Inputs are copied to where the graph reads them. Two runs on a side stream come first, so that whatever is chosen
    or compiled on first use is there before the capture.
    """
    held = noise.clone()
    given = {name: value.clone() for name, value in conditions.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            loop(held, given)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = loop(held, given)

    def replay(noise: torch.Tensor, conditions: Conditions, _loop: object = loop) -> torch.Tensor:
        held.copy_(noise)  # the graph reads the loop's own tensors, too: so the loop stays
        for name, value in conditions.items():
            given[name].copy_(value)
        graph.replay()
        return result

    return replay
