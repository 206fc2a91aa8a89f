"""A model made ready for the compiler: everything that does not depend on a SubNet, converted once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from dipgo.base.errors import DipgoError, DipgoWarning
from dipgo.base.files import cache_root, sha256_of_json
from dipgo.graph.trace import Trace
from dipgo.model.models import Model
from export.component_weights import weights_of
from export.components import VAE, components_of
from export.decoder import decoder_to_onnx
from export.encoder import encoder_to_onnx
from export.onnx.branches import with_branches
from export.onnx.convert import tensor_record
from export.onnx.denoiser_graph import DenoiserGraph, denoiser_to_onnx
from export.onnx.weights import Weights
from export.plan.hoisting import Hoisting, hoist
from export.plan.prologue import Prologue, cut_prologue, evaluate_tables
from export.records.bundle import DecoderRecord, EncoderRecord
from export.records.conditioning import ConditioningRecord, GuidanceRecord
from export.sizes import Sizes
from export.text import text_to_onnx

SHOWN = 32  # prompts of the model's folder that a bundle keeps


@dataclass(frozen=True)
class Prepared:
    """Everything about a model that does not depend on the SubNet: converted once, written into many bundles.

    Attributes:
        extra: graphs beside the denoiser's, by file name.
        tokenizers: contents of tokenizer files by name.
        weights: where the weights of all of them lie.
        variant: what the names of its graphs say to be apart from those of the bundle's other programs.
        alone: the model with the conditional pass of guidance alone; None where no program makes that.
    """

    denoiser: DenoiserGraph
    hoisting: Hoisting
    conditioning: ConditioningRecord
    decoder: DecoderRecord | None
    encoder: EncoderRecord | None
    extra: Mapping[str, ir.Model]
    tokenizers: Mapping[str, bytes]
    weights: Sequence[Weights]
    variant: str = ""
    alone: Prepared | None = None
    _tables: dict[tuple[float, ...], dict[str, np.ndarray]] = field(default_factory=dict)
    _prologues: dict[tuple[str, ...], Prologue | None] = field(default_factory=dict)

    def with_branches(self, rank: int) -> Prepared:
        """Return the same with low-rank branches at the denoiser's linear layers."""
        denoiser = with_branches(self.denoiser, rank)
        own = replace(self, denoiser=denoiser, hoisting=_hoisting(denoiser), variant=f"{self.variant}-lora{rank}")
        return replace(own, _tables={}, _prologues={})

    def with_one_pass(self, alone: Trace) -> Prepared:
        """Return the same, with the model as it was traced for the conditional pass alone."""
        other = prepare(alone, whole=False, sizes=self.sizes)
        return replace(self, alone=replace(other, variant="-unguided"))

    @property
    def trace(self) -> Trace:
        return self.denoiser.trace

    @property
    def sizes(self) -> Sizes:
        return self.denoiser.sizes

    def tables(self, timesteps: Sequence[float]) -> dict[str, np.ndarray]:
        """Return the values that depend on the timestep alone, ``[calls, …]`` each; evaluated once a sampler."""
        key = tuple(timesteps)
        if key not in self._tables:
            names = [name for name, binding in self.hoisting.binding.items() if binding == "table"]
            self._tables[key] = evaluate_tables(self.denoiser, names, timesteps)
        return self._tables[key]

    def prologue(self, kind: Literal["steps", "prompt"], names: Sequence[str], calls: int) -> Prologue | None:
        """Return the prologue that computes ``names``; cut once."""
        key = (kind, str(calls), *names)
        if key not in self._prologues:
            self._prologues[key] = cut_prologue(self.denoiser, kind, names, self.hoisting, calls)
        return self._prologues[key]


def prepare(
    traced: Trace, batch: int = 1, whole: bool = True, sizes: Sizes | None = None, image: bool = False
) -> Prepared:
    """Convert a traced denoiser, and with ``whole`` the rest of its pipeline, to ONNX; nothing is loaded.

    ``batch`` is how many images a call has, at the size of the trace; ``sizes`` says it with ranges, of all sizes.
    With ``image`` the VAE's encoder is among the rest.

    Raises:
        DipgoError: a part that has no ONNX form, a folder that is incomplete, weights of another model.
    """
    model, dtype = traced.model, traced.dtype
    sizes = sizes or Sizes(batch, traced.latent)
    cache = cache_folder(model)
    weights, extra = [weights_of(model, model.family.component, dtype, cache)], dict[str, ir.Model]()
    denoiser = denoiser_to_onnx(traced, weights[0], sizes)
    decoder, encoder, tokenizers, pictures = None, None, dict[str, bytes](), None
    if whole:
        parts = {name: weights_of(model, name, dtype, cache) for name in components_of(model)}
        weights.extend(parts.values())
        pixels = decoder_to_onnx(model, sizes.latent, dtype, parts.get(VAE))
        if pixels is not None:
            graph, decoder = pixels
            extra[decoder.file] = graph
        encoded = encoder_to_onnx(model, sizes, dtype, parts.get(VAE)) if image else None
        if encoded is not None:
            graph, pictures = encoded
            extra[pictures.file] = graph
        text = _text(model, sizes, dtype, parts)
        if text is not None:
            graphs, encoder, tokenizers = text
            extra |= graphs
    inputs = [tensor_record(value) for value in denoiser.model.graph.inputs if value.name in denoiser.condition_names]
    conditioning = ConditioningRecord(
        kind=model.family.conditioned_by,
        guided=traced.rows > 1,
        inputs=inputs,
        null_class=model.family.null_class,
        labels=model.labels(),
        prompts=_some(model.prompts()),
        fixed={name: value.flatten().tolist() for name, value in model.family.fixed.items()},
        guidance=_guidance(model, traced),
        scale=model.family.scale_argument,
        encoder=encoder,
    )
    return Prepared(denoiser, _hoisting(denoiser), conditioning, decoder, pictures, extra, tokenizers, weights)


def _hoisting(denoiser: DenoiserGraph) -> Hoisting:
    names = (value.name or "" for node in denoiser.symbolic.graph for value in node.outputs)
    return hoist(denoiser.model.graph, names, denoiser.rows)


def _guidance(model: Model, traced: Trace) -> GuidanceRecord | None:
    """Return what a request's guidance scale changes; None where it is compiled in."""
    family = model.family
    if not family.scales:
        return None
    one_pass = family.perturbs or (traced.rows > 1 and not model.at(1.0).family.guides(1.0))
    return GuidanceRecord(inputs=dict(family.scales), off=1.0 if one_pass else None, neutral=family.neutral)


def _text(model: Model, sizes: Sizes, dtype: torch.dtype, parts: Mapping[str, Weights]) -> Any:
    """Return the text encoders in ONNX, None where there are none.

    Those of an observed pipeline may have no form in ONNX: its bundles take embeddings, which a warning says.
    """
    try:
        return text_to_onnx(model, sizes.batch if isinstance(sizes.batch, int) else 1, dtype, parts, sizes)
    except DipgoError as error:
        if not model.family.under:
            raise
        warnings.warn(f"the bundle takes embeddings, not prompts: {error}", DipgoWarning, stacklevel=2)
        return None


def cache_folder(model: Model) -> Path:
    """Return where weights are kept that were cast or drawn for a model: below ``$XDG_CACHE_HOME/dipgo``."""
    return cache_root() / f"{stem_of(model.name)}-{sha256_of_json(model.config)[:8]}"


def stem_of(name: str) -> str:
    """Return a model's name as the start of its graphs' names."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).name).strip("-") or "denoiser"


def _some(prompts: Sequence[str]) -> list[str]:
    """Return at most ``SHOWN`` of the prompts, spread evenly."""
    return list(prompts[:: -(-len(prompts) // SHOWN) or 1])
