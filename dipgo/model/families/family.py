"""What a family of denoisers is."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dipgo.base.errors import UsageError
from dipgo.base.guidance import ScaleArgument
from dipgo.base.layout import Layout
from dipgo.model.guidance import guided
from dipgo.model.sampler import Sampler, tabulate
from dipgo.model.vae import from_vae, to_vae

if TYPE_CHECKING:
    from dipgo.model.observed.observation import Observation

Conditions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prompting:
    """How a family's pipelines turn prompts into conditions: the maths of their ``encode_prompt``.

    Attributes:
        encoders: components that hold the text encoders; a pipeline may lack some of them.
        tokenizers: components that hold their tokenizers, one an encoder.
        tokens: what every prompt is cut and padded to.
        conditions: the conditions that depend on the prompt.
        encode: ``(encoders, token ids [B, tokens] of each, attention mask [B, tokens] or None of each) -> values`` of
            :attr:`conditions`, then of the first of them with the last layer skipped, the last two, … (``clip_skip``).
        skips: ``configurations of the encoders -> how many layers may be skipped``.
        lengths: of each tokenizer, where they differ.
        before, after: what stands around the prompt in the text that each tokenizer is given.
        own_length: whether prompts are cut to the tokenizer's own ``model_max_length``, which must be :attr:`tokens`.
        masked: ``text encoder's config -> whether it is given an attention mask``.
        lower: whether prompts are stripped and lower-cased first.
        always_zeros: whether zeros stand for no prompt in any case.
        zeros: entry of ``model_index.json`` by which zeros stand for no prompt, not the empty prompt's encoding.
        fixed: ``(denoiser config, pixels a side of the latent's cell) -> conditions, one row``, which do not depend on
            the prompt.
        prefixes: what stands before parameters' names in checkpoints of an older transformers.
        side: on which prompts are padded; None leaves it to the tokenizer.
        negative: how negative prompts are read, and the empty one in their place; None is as prompts are.
    """

    encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    tokens: int
    conditions: tuple[str, ...]
    encode: Callable[
        [Sequence[nn.Module], Sequence[torch.Tensor], Sequence[torch.Tensor | None]], tuple[torch.Tensor, ...]
    ]
    skips: Callable[[Sequence[Any]], int] = field(default=lambda configs: 0)
    lengths: tuple[int, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    own_length: bool = False
    masked: Callable[[Mapping[str, Any]], bool] = field(default=lambda config: False)
    lower: bool = False
    always_zeros: bool = False
    zeros: str | None = None
    fixed: Callable[[Mapping[str, Any], int], Conditions] = field(default=lambda config, vae_scale: {})
    prefixes: tuple[str, ...] = ()
    side: Literal["right", "left"] | None = None
    negative: Prompting | None = None


@dataclass(frozen=True)
class Family:
    """One class of denoiser.

    Attributes:
        denoiser_class: name of the diffusers model class.
        pipelines: names of the pipeline classes whose loop this is; empty where it was observed
            (:mod:`dipgo.model.families.observed`).
        component: attribute of the pipeline that holds it.
        conditioned_by: ``"class"``, ``"prompt"`` or ``"nothing"``.
        sites: module name patterns by granularity (see :func:`dipgo.graph.sites.site_names`); empty for a class
            without an entry, whose sites are given as patterns.
        granularity: the default granularity; None where there is none.
        encode: ``(pipeline, labels or prompts) -> conditions`` of the unconditional half, then the conditional.
        example: ``(denoiser config, rows) -> conditions`` of the right shapes and dtypes, for tracing; zeros wherever
            the values come from a text encoder.
        call: ``(denoiser, sample, timestep [B], conditions) -> model output``.
        conditional_first: whether the pipeline calls its denoiser with the conditional pass of guidance first; here the
            unconditional one always is.
        table: ``(scheduler, steps) -> its table``, as the pipeline uses it.
        guides: ``guidance scale -> whether there are two passes``.
        perturbs: whether a third pass follows these, the conditional one again under other attention.
        guide: ``(unconditional output, conditional output, guidance scale, rescale) -> guided output``; the third
            pass's output comes last.
        neutral: the guidance scale at which the guided output is the conditional one.
        scales: conditions that are so many times the guidance scale.
        latent: ``denoiser config -> shape of a latent``, without the batch.
        noise: how drawn noise becomes the latent; None as it is.
        to_vae: ``(latents, VAE's config) -> what the VAE decodes``; None where nothing is decoded.
        from_vae: the way back.
        under: ``(guidance scale, height and width in pixels, or None) -> the family there``; None where it is the same
            everywhere.
        scale: the guidance scale that it was observed at; None where it is the same at all.
        scale_argument: what the pipeline's call names the guidance scale.
        fixed: conditions that do not depend on the prompt, one row each.
        pixels: height and width of images that it is for alone; None where the latent's shape tells.
        seen: what its pipeline was seen to do; None where the pipeline is known.
        null_class: the label of the unconditional half, where classes condition.
        labels: ``(model_index.json, denoiser config) -> {name: class}``.
        prompting: ``denoiser config -> how prompts become conditions``; None where there are none, or nobody knows.
        uneven: whether a latent's sides need not be multiples of its coarsest cell: UNets that resize to fit.
        whole: ``pipeline -> its denoiser`` where that is more than :attr:`component`.
        besides: ``(pipeline, prompts, height and width in pixels) -> what its call is given beside prompts``.
        upcasts_vae: ``denoiser config -> whether the pipeline decodes in float32 where the VAE asks for it``
            (``force_upcast``, which every diffusers VAE has by default, and most pipelines ignore).
    """

    denoiser_class: str
    pipelines: tuple[str, ...]
    component: str
    conditioned_by: Literal["class", "prompt", "nothing"]
    sites: Mapping[str, Sequence[str]]
    granularity: str | None
    encode: Callable[[Any, Sequence[Any]], tuple[Conditions, Conditions]]
    example: Callable[[Mapping[str, Any], int], Conditions]
    call: Callable[[nn.Module, torch.Tensor, torch.Tensor, Conditions], torch.Tensor]
    conditional_first: bool = False
    table: Callable[[Any, int], Sampler] = field(default=tabulate)
    guides: Callable[[float], bool] = field(default=lambda scale: scale > 1)
    perturbs: bool = False
    guide: Callable[..., torch.Tensor] = field(default=guided)
    neutral: float = 1.0
    scales: Mapping[str, float] = field(default_factory=dict)
    latent: Callable[[Mapping[str, Any]], tuple[int, ...]] = field(
        default=lambda config: (config["in_channels"], *latent_size(config))
    )
    noise: Layout | None = None
    to_vae: Callable[[torch.Tensor, Any], torch.Tensor] | None = field(default=to_vae)
    from_vae: Callable[[torch.Tensor, Any], torch.Tensor] = field(default=from_vae)
    under: Callable[[float, tuple[int, int] | None], Family] | None = None
    scale: float | None = None
    scale_argument: ScaleArgument = "guidance_scale"
    fixed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    pixels: tuple[int, int] | None = None
    seen: Observation | None = None
    null_class: int | None = None
    labels: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, int]] = field(default=lambda index, config: {})
    prompting: Callable[[Mapping[str, Any]], Prompting | None] = field(default=lambda config: None)
    uneven: bool = False
    whole: Callable[[Any], nn.Module] | None = None
    besides: Callable[[Any, Sequence[Any], tuple[int, int]], dict[str, Any]] = field(
        default=lambda pipe, prompts, size: {}
    )
    upcasts_vae: Callable[[Mapping[str, Any]], bool] = field(default=lambda config: False)

    def denoiser(self, pipe: Any) -> nn.Module:
        """Return the denoiser of a pipeline as a module that all sites lie in."""
        module: nn.Module = self.whole(pipe) if self.whole else getattr(pipe, self.component)
        return module

    def passes(self, scale: float) -> int:
        """Return how many passes a step makes at a guidance scale."""
        return (2 if self.guides(scale) else 1) + self.perturbs

    def at(self, scale: float, pixels: tuple[int, int] | None = None) -> Family:
        """Return the family at a guidance scale and a size of images in pixels.

        Raises:
            UsageError: a size for a family whose schedules serve every size.
        """
        if self.under is None and pixels:
            raise UsageError("--size: a schedule of this model serves images of all sizes; give it to the export")
        return self.under(scale, pixels or self.pixels) if self.under else self

    def conditions(self, pipe: Any, given: Sequence[Any]) -> tuple[Conditions, Conditions]:
        """Return the conditions of labels or prompts: the unconditional half, then the conditional, B rows each.

        A pipeline without its text encoder (random weights) gets stand-ins for embeddings: normal noise that depends
        on the prompt alone.
        """
        if self.conditioned_by != "prompt" or getattr(pipe, "text_encoder", None) is not None:
            return self.encode(pipe, given)
        config: Any = self.denoiser(pipe).config
        return self._stand_ins(config, [""] * len(given)), self._stand_ins(config, given)

    def _stand_ins(self, config: Mapping[str, Any], prompts: Sequence[Any]) -> Conditions:
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(zlib.crc32(str(prompt).encode()))
            rows.append(
                {
                    name: value if value.any() else torch.randn(value.shape, generator=generator)
                    for name, value in self.example(config, 1).items()
                }
            )
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width of a denoiser's latent."""
    size = config["sample_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width
