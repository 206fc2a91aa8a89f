"""The sampling trajectory in torch, gated and differentiable: the ground on which the search works.

The sampler is applied as a table (:mod:`dipgo.model.sampler`), so the whole trajectory is one differentiable function
of the gates, the backup weights and the noise. Parity with the real diffusers pipeline is a test.

The noise of a batch is ``[B, *latent]``; where the sampler draws more on its way, ``[B, 1 + draws, *latent]``, the
initial one first.

Each call of the denoiser is a function of its latent and of the cached outputs that it reads. What no later step
reads (:mod:`dipgo.graph.liveness`) is let go of at once; with ``recompute`` nothing else outlives the call, and the
call is run again when gradient comes back to it (Chen et al. 2016, activation checkpointing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from dipgo.base.errors import DipgoError
from dipgo.eager.gating import combine, intercepting
from dipgo.graph.liveness import LiveSites, plan
from dipgo.graph.outputs import Rebuild, take_apart
from dipgo.graph.sites import Site
from dipgo.model.families import Conditions, GuidedDenoiser
from dipgo.model.sampler import Sampler
from dipgo.schedule.schedule import backup_name

Backups = Mapping[str, torch.Tensor]
"""Weights of backups by name, shaped as in a :class:`~dipgo.schedule.schedule.Schedule`."""
Past = list[list[torch.Tensor]]
"""The cached outputs that a site reads, newest first."""
Reads = list[dict[int, tuple[int, ...]]]
"""For every step, the sites that read cached outputs, each with the steps that these come from, newest first."""
Rule = Callable[[int, int, Past, Callable[[], list[torch.Tensor]]], list[torch.Tensor] | None]
"""``(step, site, past, compute)`` to what the site hands on, which is what later steps find; None where it is dead."""


def every_site(row: np.ndarray, stored: Iterable[int] = ()) -> set[int]:
    """Stand in for ``Trace.live_sites`` where there is no trace: take every site as read."""
    return set(range(len(row)))


@dataclass(frozen=True)
class Trajectory:
    """A denoiser, its sites and its sampler.

    Attributes:
        live_sites: ``Trace.live_sites``; without it every site counts as read in every step, which costs memory only.
        precision: what the denoiser computes in, by autocast; None is float32. Weights, latents and solver stay
            float32.
        recompute: keep no activations between steps; run each step again for its gradient.
    """

    guided: GuidedDenoiser
    sites: tuple[Site, ...]
    sampler: Sampler
    live_sites: LiveSites = every_site
    precision: torch.dtype | None = None
    recompute: bool = False

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.sites]

    @property
    def device(self) -> torch.device:
        return next(self.guided.denoiser.parameters()).device

    def full(self, noise: torch.Tensor, conditions: Conditions) -> list[torch.Tensor]:
        """Run with every gate 1, without gradient; returns the latents after 0, 1, … calls, each ``[B, C, H, W]``."""
        with torch.no_grad():
            return self.integrate(noise, lambda step, latent, timestep: self.call(latent, timestep, conditions))

    def observed(
        self, noise: torch.Tensor, conditions: Conditions, observe: Callable[[int, int, list[torch.Tensor]], None]
    ) -> None:
        """Run with every gate 1, without gradient, and show ``observe`` the outputs of each site at each step."""

        def rule(step: int, site: int, past: Past, compute: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
            outputs = compute()
            observe(step, site, outputs)
            return outputs

        with torch.no_grad():
            self._intercepted(noise, conditions, [{}] * self.sampler.calls, rule)

    def gated(
        self, noise: torch.Tensor, conditions: Conditions, gates: np.ndarray, backups: Backups
    ) -> list[torch.Tensor]:
        """Run under hard gates, executing only what they keep; returns the latents after 0, 1, … calls.

        Args:
            gates: bool ``[calls, sites]``.
            backups: weights through which gradient flows; none serves the last output as it is.

        Raises:
            DipgoError: a site whose output changes its shape from step to step.
        """
        history = next((weights.shape[1] for weights in backups.values()), 1)
        reads = _reads(np.asarray(gates, bool).tobytes(), len(gates), history, self.live_sites)

        def rule(step: int, site: int, past: Past, compute: Callable[[], list[torch.Tensor]]) -> Any:
            if gates[step, site]:
                return compute()
            return self.backup(site, step, past, backups) if past else None

        return self._intercepted(noise, conditions, reads, rule)

    def supernet(self, noise: torch.Tensor, conditions: Conditions, gates: torch.Tensor) -> list[torch.Tensor]:
        """Run the SuperNet (paper, section 3.1): both branches of every site, mixed by its gate.

        ``gates`` is float ``[calls, sites]`` with hard values 0 and 1 (straight-through: they carry gradient). A site
        hands on ``gate · output + (1 - gate) · last output``. As in the paper the last output is the mixed one, so that
        gradient reaches the gates through later steps too; the first step is always computed.
        """
        calls, sites = gates.shape
        reads: Reads = [dict.fromkeys(range(sites), (step - 1,)) if step else {} for step in range(calls)]
        gates = gates.to(self.device)

        def rule(step: int, site: int, past: Past, compute: Callable[[], list[torch.Tensor]]) -> Any:
            computed = compute()
            if step == 0:
                return computed
            gate = gates[step, site]
            return [gate * new + (1 - gate) * old for new, old in zip(computed, past[0], strict=True)]

        return self._intercepted(noise, conditions, reads, rule)

    def backup(
        self, site: int, step: int, past: Sequence[Sequence[torch.Tensor]], backups: Backups
    ) -> list[torch.Tensor]:
        """Return what a skipped site serves: for each of its outputs, its weighted history (newest first).

        Without guidance, weights that were learned with it are those of the conditional pass.
        """
        if not backups:
            return list(past[0])
        record = self.sites[site]
        weights = [backups[backup_name(record.name, output)][step] for output in range(len(past[0]))]
        if not self.guided.guided:
            weights = [each[:, 1] if each.ndim == 3 else each for each in weights]
        return [
            combine(entries, each.to(self.device), record.channel_axis)
            for entries, each in zip(zip(*past, strict=True), weights, strict=True)
        ]

    def _intercepted(self, noise: torch.Tensor, conditions: Conditions, reads: Reads, rule: Rule) -> list[torch.Tensor]:
        """Integrate with ``rule`` in the place of every site, caching exactly what ``reads`` says."""
        last = {(source, site): step for step, row in enumerate(reads) for site, past in row.items() for source in past}
        cache: dict[tuple[int, int], list[torch.Tensor]] = {}
        rebuilds: dict[int, Rebuild] = {}
        shapes: dict[int, tuple[int, list[torch.Size]]] = {}
        dtypes: dict[int, list[torch.dtype]] = {}

        def denoise(step: int, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            pasts = {site: [cache[source, site] for source in sources] for site, sources in reads[step].items()}

            def call(latent: torch.Tensor) -> tuple[torch.Tensor, dict[int, list[torch.Tensor]]]:
                fresh = {}

                def intercept(site: int, compute: Callable[[], Any]) -> Any:
                    def computed() -> list[torch.Tensor]:
                        tensors, rebuilds[site] = take_apart(compute())
                        now = [tensor.shape for tensor in tensors]
                        first, then = shapes.setdefault(site, (step, now))
                        dtypes.setdefault(site, [tensor.dtype for tensor in tensors])
                        if now != then:
                            raise DipgoError(_changed(self.names[site], first, then, step, now))
                        return tensors

                    tensors = rule(step, site, pasts.get(site, []), computed)
                    if tensors is None:  # nobody reads it, so nothing of it was kept; only shape and dtype matter
                        tensors = [
                            latent.new_zeros((), dtype=dtype).expand(shape)
                            for shape, dtype in zip(shapes[site][1], dtypes[site], strict=True)
                        ]
                    elif (step, site) in last:
                        fresh[site] = tensors
                    return rebuilds[site](tensors)

                with intercepting(self.guided.denoiser, self.names, intercept):
                    return self.call(latent, timestep, conditions), fresh

            if self.recompute and torch.is_grad_enabled():
                epsilon, fresh = checkpoint(call, latent, use_reentrant=False, preserve_rng_state=False)
            else:
                epsilon, fresh = call(latent)
            for key in [key for key in cache if last[key] <= step]:
                del cache[key]
            cache.update({(step, site): tensors for site, tensors in fresh.items()})
            return epsilon

        return self.integrate(noise, denoise)

    def call(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Call the denoiser in ``precision``; returns ε in float32."""
        if self.precision is None:
            return self.guided(latent, timestep, conditions)
        with torch.autocast(self.device.type, dtype=self.precision):
            return self.guided(latent, timestep, conditions).to(latent.dtype)

    def integrate(
        self, noise: torch.Tensor, denoise: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Apply the sampler's table to ``denoise(step, latent, timestep)``; returns the latents after 0, 1, … calls."""
        rows = torch.tensor(self.sampler.rows, dtype=noise.dtype, device=noise.device)
        basis = list(noise.unbind(1)) if self.sampler.draws else [noise]
        latents = [basis[0] * rows[0, 0]]
        for step, timestep in enumerate(self.sampler.timesteps):
            scaled = latents[-1] * self.sampler.input_scale[step]
            basis.append(denoise(step, scaled, torch.full((len(noise),), timestep, device=noise.device)))
            coefficients = rows[step + 1, : len(basis)]
            latents.append(torch.tensordot(coefficients, torch.stack(basis), dims=1))
        return latents


@lru_cache(maxsize=16)  # learning backups runs the same gates at every iteration
def _reads(gates: bytes, calls: int, history: int, live_sites: LiveSites) -> Reads:
    table = np.frombuffer(gates, bool).reshape(calls, -1)
    return [entry.served for entry in plan(table, history, live_sites)]


def _changed(name: str, first: int, then: Sequence[Any], step: int, now: Sequence[Any]) -> str:
    before, after = (" and ".join(str(list(shape)) for shape in shapes) for shapes in (then, now))
    return (
        f"site '{name}' hands on {before} at step {first} but {after} at step {step}, so no step can serve another's "
        "output; leave it out with --sites"
    )
