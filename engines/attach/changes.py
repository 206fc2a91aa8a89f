"""What was done to a denoiser in memory that changes what it computes: a bundle in its place would leave it out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from torch.nn.modules import module as torch_module

from dipgo.base.errors import UsageError

_PLACES_ALONE = {  # hooks of accelerate and diffusers that move weights between devices
    "AlignDevicesHook",
    "CpuOffload",
    "UserCpuOffloadHook",
    "GroupOffloadingHook",
    "LazyPrefetchGroupOffloadingHook",
    "LayerExecutionTrackerHook",
}
_SAME_ATTENTION = {  # ways to compute the same products
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}
_OF_TRAINING = ("training", "gradient_checkpointing")


def check_unchanged(denoiser: Any) -> None:
    """Refuse a denoiser with hooks, a replaced ``forward``, other modules or attributes than its configuration makes.

    Hooks that only place weights, and processors that compute the same attention, make no difference.

    Raises:
        UsageError: naming the module and what was done to it.
    """
    change = next(_changes(denoiser), None)
    if change:
        raise UsageError(
            f"the denoiser was changed after it was loaded: {change}; the bundle was compiled without that: undo it, "
            "or load the pipeline anew"
        )


def _changes(denoiser: Any) -> Iterator[str]:
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        yield "hooks on all modules of torch"
    with init_empty_weights():
        as_made = dict(type(denoiser).from_config(denoiser.config).named_modules())
    modules = dict(denoiser.named_modules())
    for name in [name for name in modules if name not in as_made]:
        yield f"'{name}' was added ({type(modules[name]).__name__})"
    for name in [name for name in as_made if name not in modules]:
        yield f"'{name}' was taken away"
    for name, module in modules.items():
        place = f"'{name}'" if name else "it"
        if type(module) is not type(as_made[name]):
            yield f"{place} is a {type(module).__name__}, not a {type(as_made[name]).__name__}"
        else:
            yield from (f"{place} has {what}" for what in _of_module(module, as_made[name]))


def _of_module(module: nn.Module, as_made: nn.Module) -> Iterator[str]:
    if module._forward_hooks or module._forward_pre_hooks:
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        yield f"a hook ({getattr(hooks[0], '__name__', type(hooks[0]).__name__)})"
    hooks = _hooks_of_libraries(module)
    if other := next((type(hook).__name__ for hook in hooks if type(hook).__name__ not in _PLACES_ALONE), None):
        yield f"a hook ({other})"
    if "forward" in vars(module) and not hooks:
        yield "a 'forward' of its own"
    if not type(module).forward.__module__.startswith(("diffusers.", "torch.")):
        yield f"a 'forward' from {type(module).forward.__module__}"
    mine, theirs = _attributes(module), _attributes(as_made)
    for name in sorted(mine.keys() | theirs.keys()):
        value, usual = mine.get(name), theirs.get(name)
        if value != usual and not {value, usual} <= _SAME_ATTENTION:
            yield f"{name} = {value}, as made {usual}"


def _hooks_of_libraries(module: Any) -> list[Any]:
    """Return the hooks of accelerate and diffusers, which take the place of ``forward``."""
    hook = vars(module).get("_hf_hook")
    hooks = list(getattr(hook, "hooks", [hook])) if hook is not None else []
    registry = vars(module).get("_diffusers_hook")
    return hooks + (list(registry.hooks.values()) if registry is not None else [])


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module was told beside its weights: plain values, and the types of others; None is nothing."""
    plain = (bool, int, float, str)
    return {
        name: value if isinstance(value, plain) else type(value).__name__
        for name, value in vars(module).items()
        if not name.startswith("_") and value is not None and name not in (*_OF_TRAINING, "forward")
    }
