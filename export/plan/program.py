"""A program while it is compiled: the graphs of the loop and their launches, and what layouts make both from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dipgo.base.files import sha256_of_json
from dipgo.graph.liveness import StepPlan
from export.plan.cut import Cut, Loop, cut
from export.plan.launches import EPSILON, LATENT, Launch, Value


@dataclass(frozen=True)
class Work:
    """What a layout is made from.

    Attributes:
        loop: the denoiser, backups and solver.
        plans: of every step.
        launched: the steps that compute ε, ascending; the others have the ε of the one before.
        stem: how graphs' names begin (the model).
        ending: how they end (dtype and shape).
    """

    loop: Loop
    plans: Sequence[StepPlan]
    launched: Sequence[int]
    stem: str
    ending: str

    def features(self, sites: Iterable[int]) -> list[str]:
        """Return the values that are the outputs of ``sites``."""
        return [name for site in sorted(sites) for name in self.loop.denoiser.features[site]]

    def signature(self, computed: Iterable[int]) -> str:
        chosen = set(computed)
        return "".join("1" if site in chosen else "0" for site in range(len(self.loop.denoiser.features)))

    def name(self, *facts: object) -> str:
        """Return a graph's name: unique and stable, with a digest of everything that its content follows from."""
        loop = self.loop
        widths = {key: list(array.shape[1:]) for key, array in loop.backups.items()}
        key = sha256_of_json([*facts, loop.denoiser.features, widths, loop.history, loop.scaled])[:8]
        return f"{self.stem}-{key}-{self.ending}"

    def cut(self, name: str, computed: Iterable[int], outputs: Sequence[str]) -> Cut:
        """Cut the graph of a whole step that computes some sites and serves the others."""
        chosen = set(computed)
        served = self.features(site for site in range(len(self.loop.denoiser.features)) if site not in chosen)
        return cut(self.loop, name, served, served, outputs)

    def launch(self, part: Cut, step: int, writes: Iterable[str]) -> Launch:
        """Return the launch of a graph at a step: which values its inputs and outputs are."""
        written = {name: (name, step) for name in writes}
        if "next" in {tensor.name for tensor in part.outputs}:
            written["next"] = (LATENT, self._after(step))
        reads = {name: self._source(value, term, step) for name, (value, term) in part.reads.items()}
        return Launch(step, str(part.model.graph.name), reads, written)

    def _after(self, step: int) -> int:
        """Return the next step that is launched, or the one after the last."""
        return next((later for later in self.launched if later > step), len(self.plans))

    def _source(self, value: str, term: int, step: int) -> Value:
        """Return where an input's value comes from. What is not there yet has coefficient 0: anything will do."""
        if value in (LATENT, EPSILON):
            if not self.loop.history:
                return LATENT, 0  # the host writes every x into one slot
            place = self.launched.index(step) - term
            return (value, self.launched[place]) if place >= 0 else (LATENT, step)
        site = self.loop.denoiser.site_of.get(value)
        if site is None or site not in self.plans[step].served:
            return value, step
        sources = self.plans[step].served[site]
        return value, sources[min(term, len(sources) - 1)]


@dataclass(frozen=True)
class Program:
    """Graphs by name, the signature of each, and the launches in order."""

    cuts: dict[str, Cut]
    signatures: dict[str, str]
    launches: list[Launch]
