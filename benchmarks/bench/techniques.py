"""The model in torch as a subject, and what else makes it faster there: compilers, and caches of others.

Each is applied with the settings that its authors' documentation shows. To add one: a function that changes the
pipeline and returns what resets it before a trajectory, and a line in :data:`TECHNIQUES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from benchmarks.failures import NotMeasuredError
from dipgo.base import install
from dipgo.base.errors import DipgoError
from dipgo.model.families import family_of

Reset = Callable[[], None]


@dataclass
class Position:
    """Where the loop is, for techniques that ask: the timestep of the call under way."""

    timestep: float = 0.0


@dataclass(frozen=True)
class Technique:
    """A way to run the model.

    Attributes:
        apply: ``(pipeline, position) -> what to call before each trajectory``; raises where it does not fit the model.
        exact: it computes what the full model does, but for rounding, and is held against it.
    """

    apply: Callable[[Any, Position], Reset]
    exact: bool = False


def eager(pipe: Any, position: Position) -> Reset:
    """Leave the model as it is."""
    return lambda: None


def compiled(pipe: Any, position: Position) -> Reset:
    """Compile the denoiser with ``torch.compile``, static shapes, in the mode that is fastest.

    On a GPU ``max-autotune``, which has CUDA graphs; on a CPU with weights folded in as constants.
    """
    denoiser = _denoiser(pipe)
    if next(denoiser.parameters()).device.type == "cpu":
        denoiser.compile(dynamic=False, options={"freezing": True})
    else:
        denoiser.compile(dynamic=False, mode="max-autotune")
    return lambda: None


def deep_cache(pipe: Any, position: Position, interval: int) -> Reset:
    """Apply DeepCache (Ma et al. 2024) as its package does: every ``interval``-th step whole, the others at branch 0.

    Raises:
        NotMeasuredError: not a UNet.
        DipgoError: the package is missing.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None or not hasattr(unet, "down_blocks"):
        raise NotMeasuredError("DeepCache is for UNets")
    try:
        from DeepCache import DeepCacheSDHelper  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise DipgoError(f"DeepCache is not installed; {install.BASELINES}") from error
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    wrapped = unet.forward

    def forward(sample: Any, timestep: Any, *rest: Any, **options: Any) -> Any:
        return wrapped(sample, timestep.reshape(-1)[0], *rest, **options)  # the helper looks the number up

    unet.forward = forward

    def reset() -> None:
        helper.cached_output.clear()
        helper.start_timestep = None

    return reset


def first_block_cache(pipe: Any, position: Position, threshold: float = 0.05) -> Reset:
    """Skip all blocks but the first where its residual has moved by less than that since the last computed step."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    denoiser = _denoiser(pipe)
    if len(getattr(denoiser, "transformer_blocks", ())) < 2:
        raise NotMeasuredError(f"FirstBlockCache is for transformers: {type(denoiser).__name__} has no row of blocks")
    apply_first_block_cache(denoiser, FirstBlockCacheConfig(threshold=threshold))
    return _reset_of(denoiser)


def pyramid_attention_broadcast(pipe: Any, position: Position) -> Reset:
    """Serve self-attention's last output every other step between timesteps 800 and 100 (Zhao et al. 2024)."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    denoiser = _denoiser(pipe)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: position.timestep,
    )
    apply_pyramid_attention_broadcast(denoiser, config)
    return _reset_of(denoiser)


def cache_dit(pipe: Any, position: Position, threshold: float = 0.08) -> Reset:
    """Apply cache-dit's DBCache with its defaults, but one block that is always computed, as small models need it.

    The other blocks are skipped where the residual of that one has moved by less than ``threshold``.

    Raises:
        NotMeasuredError: a model that the package does not know.
        DipgoError: the package is missing.
    """
    try:
        import cache_dit as package  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise DipgoError(f"cache-dit is not installed; {install.BASELINES}") from error
    denoiser = _denoiser(pipe)
    config = package.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=threshold)
    try:
        package.enable_cache(denoiser, cache_config=config)
    except ValueError as error:
        raise NotMeasuredError(f"cache-dit does not know {type(denoiser).__name__}") from error
    return lambda: package.refresh_context(denoiser, cache_config=config)


EAGER = "eager torch"
TECHNIQUES: Mapping[str, Technique] = {
    EAGER: Technique(eager, exact=True),
    "torch.compile": Technique(compiled, exact=True),
    "DeepCache, N = 2": Technique(partial(deep_cache, interval=2)),
    "DeepCache, N = 3": Technique(partial(deep_cache, interval=3)),
    "DeepCache, N = 5": Technique(partial(deep_cache, interval=5)),
    "diffusers FirstBlockCache": Technique(first_block_cache),
    "diffusers PyramidAttentionBroadcast": Technique(pyramid_attention_broadcast),
    "cache-dit": Technique(cache_dit),
}


def _denoiser(pipe: Any) -> nn.Module:
    denoiser: nn.Module = getattr(pipe, family_of(pipe).component)
    return denoiser


def _reset_of(denoiser: nn.Module) -> Reset:
    """Return what forgets all that hooks hold, and names a context, without which they refuse to run.

    Raises:
        NotMeasuredError: no hook was attached anywhere.
    """
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    if not any(hasattr(module, "_diffusers_hook") for module in denoiser.modules()):
        raise NotMeasuredError(f"it finds nothing to attach to in {type(denoiser).__name__}")
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)

    def reset() -> None:
        registry.reset_stateful_hooks(recurse=True)
        _set_cache_context(denoiser, CacheContext("both"))

    return reset
