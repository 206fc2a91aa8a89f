"""What all programs of a workload share: the model on the device, its inputs, traces of it, and the SubNets."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.cases import FULL, Workload
from dipgo.base.dtypes import PRECISIONS
from dipgo.base.errors import DipgoError, UsageError
from dipgo.graph.exported import in_dtype
from dipgo.graph.liveness import canonical
from dipgo.graph.trace import Trace, trace
from dipgo.importers.deepcache import DeepCache
from dipgo.importers.importer import apply
from dipgo.model.families import Conditions, Family, GuidedDenoiser
from dipgo.model.models import ARCHITECTURES, Model, find_model
from dipgo.model.sampler import Sampler, make_scheduler, tabulate
from dipgo.schedule.backup_names import backup_name
from dipgo.schedule.cost import cost_of, trajectory_macs
from dipgo.schedule.policies import SPACINGS, extrapolation, spaced
from dipgo.schedule.subnet import SubNet, load_subnet

MAIN_SHARE, MIXED_SHARE = 0.2, 0.35
PUBLISHED = Path(__file__).parents[2] / "dipgo" / "published" / "sd15-published-0.8.json"
_TINY: dict[str, dict[str, Any]] = {  # of the published SubNet's blocks, or of the architecture's, but small
    "sd-1.5": {
        "block_out_channels": [8, 8, 16, 16],
        "down_block_types": ["CrossAttnDownBlock2D", *["DownBlock2D"] * 3],
        "up_block_types": [*["UpBlock2D"] * 3, "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "sample_size": 8,
        "cross_attention_dim": 16,
    },
    "dit-xl-2": {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8},
    "sdxl": {
        "block_out_channels": [8, 16, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "sample_size": 8,
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 16,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}


@dataclass(frozen=True)
class Plan:
    """A program without a backend: the SubNet, and the trace and the sampler that it is for."""

    trace: Trace
    sampler: Sampler
    subnet: SubNet


@dataclass(frozen=True, eq=False)
class Ground:
    """A workload on a device.

    Attributes:
        model: architecture with random weights.
        denoiser: in the workload's dtype, the weights drawn on the device.
        noise: float32 ``[B, C, H, W]``.
        conditions: of B images, the unconditional half first.
    """

    workload: Workload
    device: torch.device
    model: Model
    denoiser: nn.Module
    noise: torch.Tensor
    conditions: Conditions
    _traces: dict[str, Trace] = field(default_factory=dict)
    _plans: dict[str, Plan] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.workload.dtype].torch

    @property
    def guided(self) -> GuidedDenoiser:
        return GuidedDenoiser(self.denoiser, in_dtype(self.model.family, self.dtype), self.workload.guidance)

    @cached_property
    def scheduler(self) -> Any:
        import diffusers

        folder = self.model.folder
        name = json.loads((folder / "model_index.json").read_text())["scheduler"][1]
        own = getattr(diffusers, name).from_pretrained(folder / "scheduler")
        return make_scheduler(self.workload.sampler, own)

    def sampler(self, steps: int) -> Sampler:
        return tabulate(self.scheduler, steps, self.model.family.scales_noise)

    def traced(self, sites: str | None = None) -> Trace:
        """Return the trace with these sites, or with the workload's own; each is made once."""
        spec = sites or self.workload.sites
        if spec not in self._traces:
            self._traces[spec] = trace(self.model, spec, self.workload.guidance, self.dtype)
        return self._traces[spec]

    def plan(self, program: str) -> Plan:
        """Return a program's plan, made once.

        Raises:
            UsageError: no such program.
        """
        if program not in self._plans:
            self._plans[program] = self._make(program)
        return self._plans[program]

    def _make(self, program: str) -> Plan:
        steps = self.workload.steps
        if program.startswith("deepcache-"):
            policy = DeepCache(int(program.rpartition("-")[2]), 0, None)
            traced, sampler = self.traced(policy.sites(self.denoiser)), self.sampler(steps)
            return Plan(traced, sampler, apply(policy, traced, sampler, self.denoiser))
        traced = self.traced()
        if program == "fewer-steps":
            ratio = self.plan(self.workload.main).subnet.cost.ratio
            sampler = self.sampler(max(2, round(steps * ratio)))
            return Plan(traced, sampler, _subnet(traced, sampler, np.ones((sampler.calls, len(traced.sites)), bool)))
        sampler = self.sampler(steps)
        shape = (sampler.calls, len(traced.sites))
        if program == FULL:
            return Plan(traced, sampler, _subnet(traced, sampler, np.ones(shape, bool)))
        if program == "published":
            gates = published_gates([site.name for site in traced.sites], sampler)
            return Plan(traced, sampler, _subnet(traced, sampler, gates))
        if program == "whole-steps":
            gates = spaced(traced, sampler.calls, MAIN_SHARE, SPACINGS["uniform"], "whole")
            return Plan(traced, sampler, _subnet(traced, sampler, gates))
        if program == "mixed":
            return Plan(traced, sampler, mixed(traced, sampler))
        raise UsageError(f"there is no program '{program}'")


def prepare_ground(workload: Workload, device: torch.device, tiny: bool, scratch: Path) -> Ground:
    """Draw a workload's model on the device; ``scratch`` is a folder for tiny configurations."""
    model = find_model(str(_tiny_folder(workload.model, scratch)) if tiny else workload.model, random_weights=True)
    dtype = PRECISIONS[workload.dtype].torch
    denoiser = drawn(model, dtype, device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(model.latent_shape(workload.batch), generator=generator).to(device)
    conditions = _conditions(in_dtype(model.family, dtype), model, workload, generator)
    return Ground(
        workload, device, model, denoiser, noise, {name: value.to(device) for name, value in conditions.items()}
    )


def drawn(model: Model, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the denoiser with weights drawn on the device, by the rule of :func:`dipgo.model.random_weights.draw`.

    The values are the device's own: other devices give others.
    """
    denoiser = model.empty_denoiser(dtype)
    for prefix, owner in denoiser.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            generator = torch.Generator(device).manual_seed(zlib.crc32(f"{prefix}.{name}".encode()))
            if value.ndim > 1:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
            elif value.ndim == 0 or name.endswith("weight"):
                value.fill_(1)
            else:
                value.normal_(0, 0.02, generator=generator)
            setattr(owner, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner._buffers[name] = buffer.to(device)
    return denoiser


def published_gates(names: list[str], sampler: Sampler) -> np.ndarray:
    """Return the gates that DiP-GO's authors published for SD-1.5, bool ``[50, 9]``.

    Raises:
        DipgoError: other sites or timesteps than theirs.
    """
    found = load_subnet(PUBLISHED)
    if [site.name for site in found.sites] != names or found.sampler.timesteps != list(sampler.timesteps):
        raise DipgoError(f"{PUBLISHED.name} is for other sites or timesteps; use it with sd-1.5 and 50 steps of ddim")
    return found.gates


def mixed(traced: Trace, sampler: Sampler) -> SubNet:
    """Return a SubNet of the kind that a search finds: late-dense, several signatures, weights by channel.

    Whole steps denser late; between them extrapolated backups inside, and in some of these steps the first or the last
    third of the sites as well, as far as the budget goes. It is made by rule, since images do not matter here.
    """
    calls, order = sampler.calls, traced.execution_order()
    limit = MIXED_SHARE * traced.full_macs * calls
    for serving in ("inside", "mixed", "whole"):  # the first that leaves something to spend
        gates = spaced(traced, calls, 0.8 * MIXED_SHARE, SPACINGS["late"], serving, learned=True)
        if trajectory_macs(traced, gates, True) < limit:
            break
    third = max(1, len(order) // 3)
    skipped = [step for step in range(1, calls) if not gates[step].all()]
    for number, step in enumerate(skipped[::-1]):
        more = gates.copy()
        more[step, order[:third] if number % 2 else order[-third:]] = True
        more = canonical(more, 2, traced.live_sites)
        if trajectory_macs(traced, more, True) <= limit:
            gates = more
    generator = np.random.default_rng(0)
    weights = {}
    channels = {
        backup_name(site.name, output): traced.shape(node, 1)[site.channel_axis]
        for site, nodes in zip(traced.sites, traced.outputs, strict=True)
        for output, node in enumerate(nodes)
    }
    for name, scalars in extrapolation(traced, gates).items():
        spread = generator.normal(1, 0.02, (*scalars.shape, channels[name]))
        weights[name] = (scalars[..., None] * spread).astype(np.float32)
    return replace(_subnet(traced, sampler, gates, learned=True), terms=2, weights=weights)


def _subnet(traced: Trace, sampler: Sampler, gates: np.ndarray, learned: bool = False) -> SubNet:
    gates = canonical(gates, 2 if learned else 1, traced.live_sites)
    identity = sampler.identity(traced.guidance_scale)
    return SubNet(traced.model.identity(), identity, traced.sites, gates, cost_of(traced, gates, learned))


def _conditions(family: Family, model: Model, workload: Workload, generator: torch.Generator) -> Conditions:
    """Return conditions of the right shapes: classes, or noise where a text encoder's values would stand."""
    guided = workload.guidance > 1
    given = dict(family.example(model.config, workload.batch * (2 if guided else 1)))
    for name, value in given.items():
        if family.conditioned_by == "class":
            classes = 37 * torch.arange(workload.batch) % 1000
            null = [torch.full_like(classes, family.null_class or 0)] * guided
            given[name] = torch.cat([*null, classes])
        elif not value.any():
            given[name] = torch.randn(value.shape, generator=generator).to(value.dtype)
    return given


def _tiny_folder(name: str, scratch: Path) -> Path:
    """Write an architecture's folder with a small denoiser."""
    folder = scratch / name
    if not folder.exists():
        shutil.copytree(ARCHITECTURES / name, folder)
        for component in ("unet", "transformer"):
            file = folder / component / "config.json"
            if file.is_file():
                file.write_text(json.dumps(json.loads(file.read_text()) | _TINY[name]))
    return folder
