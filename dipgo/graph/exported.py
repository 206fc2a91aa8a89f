"""The denoiser as one exported program: every site's outputs beside ε, in the precision it will run in."""

from __future__ import annotations

import linecache
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from dipgo.base.errors import DipgoError, UsageError, one_line
from dipgo.graph.complex_numbers import in_real_numbers
from dipgo.graph.outputs import take_apart
from dipgo.model.fakes import quiet
from dipgo.model.families import Conditions, Family, GuidedDenoiser, latent_size
from dipgo.model.models import Model


def in_dtype(family: Family, dtype: torch.dtype) -> Family:
    """Return the family of a denoiser that runs in ``dtype`` among float32 latents.

    Its ``call`` casts the latent to ``dtype`` and the output back, so that guidance and the solver work in float32;
    its ``example`` has float conditions in ``dtype``, as ``pipe.to(dtype)`` passes them. The timestep stays float32.
    """
    if dtype == torch.float32:
        return family

    def call(denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, values: Conditions) -> torch.Tensor:
        return family.call(denoiser, sample.to(dtype), timestep, values).to(torch.float32)

    def example(config: Any, rows: int) -> Conditions:
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in family.example(config, rows).items()
        }

    return replace(family, call=call, example=example)


class Tapped(nn.Module):
    """The guided denoiser with the outputs of its sites as further outputs."""

    def __init__(self, guided: GuidedDenoiser, names: Sequence[str]) -> None:
        super().__init__()
        self.guided = guided
        self.names = list(names)

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> Any:
        taps: dict[str, Any] = {}

        def tap(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if name in taps:
                    raise DipgoError(f"site '{name}' runs more than once in a call of the denoiser; leave it out")
                taps[name] = output

            return self.guided.denoiser.get_submodule(name).register_forward_hook(hook)

        handles = [tap(name) for name in self.names]
        try:
            epsilon = self.guided(latent, timestep, conditions)
        finally:
            for handle in handles:
                handle.remove()
        idle = [name for name in self.names if name not in taps]
        if idle:
            raise DipgoError(f"site '{idle[0]}' never runs in a call of the denoiser; leave it out")
        outputs = {name: take_apart(taps[name])[0] for name in self.names}
        for name, tensors in outputs.items():
            if other := next((type(value).__name__ for value in tensors if not isinstance(value, torch.Tensor)), None):
                raise DipgoError(
                    f"site '{name}' hands on a {other} beside tensors, which is not supported; leave it out"
                )
        return epsilon, list(outputs.values())


def size_multiple(config: Mapping[str, Any]) -> int:
    """Return of what the sides of a latent must be multiples: of a patch, or of a UNet's coarsest cell."""
    return int(config.get("patch_size") or 2 ** (len(config.get("block_out_channels") or [0]) - 1))


def free_sides(model: Model, denoiser: nn.Module) -> dict[int, Any]:
    """Return what stays symbolic of a latent's height and width, its axes 2 and 3.

    Raises:
        UsageError: a denoiser whose positions are a table for one size.
    """
    for name, module in denoiser.named_modules():
        if isinstance(getattr(module, "pos_embed", None), torch.Tensor):
            height, width = latent_size(model.config)
            raise UsageError(
                f"{model.name}: '{name}' holds a table of positions for a latent of {height}x{width}; leave --size away"
            )
    multiple = size_multiple(model.config)
    return {2: multiple * Dim("_height", min=1), 3: multiple * Dim("_width", min=1)}


def export_tapped(tapped: Tapped, example: tuple[Any, ...], dynamic: tuple[Any, ...]) -> ExportedProgram:
    """Trace ``tapped`` on example inputs; ``dynamic`` says which of their sizes stay symbolic.

    Raises:
        DipgoError: torch.export cannot trace it; the message names the module and the line of its source.
    """
    try:
        with torch.no_grad(), quiet(), _Exportable():
            return in_real_numbers(torch.export.export(tapped, example, dynamic_shapes=dynamic, strict=False))
    except DipgoError:
        raise
    except Exception as error:  # whatever the model's code or torch.export may raise
        if (reason := _refuses(tapped.guided, example)) is not None:
            name = type(tapped.guided.denoiser).__name__
            raise DipgoError(
                f"{name} takes other inputs than dipgo makes up for it ({reason}); not supported"
            ) from error
        raise DipgoError(_untraceable(tapped.guided.denoiser, error)) from error


def _refuses(guided: GuidedDenoiser, example: tuple[Any, ...]) -> str | None:
    """Return why a denoiser cannot be called on example inputs at all; None where it can."""
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            guided(*example)
    except (DataDependentOutputException, DynamicOutputShapeException):  # which a real call has no trouble with
        return None
    except Exception as error:  # whatever the model's code may raise
        return one_line(error)
    return None


class _Exportable(TorchFunctionMode):
    """Say in another way what does not become a graph.

    ``output_size`` of ``repeat_interleave`` is a mere hint, which torch 2.11 takes for a constant; ``fill_diagonal_``
    writes through strides, of which the exporter makes nothing; ONNX's Einsum has operands of one type.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function in (torch.repeat_interleave, torch.Tensor.repeat_interleave):
            options.pop("output_size", None)
        if function is torch.Tensor.fill_diagonal_ and args[0].ndim == 2 and not options:
            rows, columns = (torch.arange(size, device=args[0].device) for size in args[0].shape)
            return args[0].masked_fill_(rows[:, None] == columns, args[1])
        if function is torch.einsum and all(isinstance(each, torch.Tensor) for each in args[1:]):
            dtype = reduce(torch.promote_types, (each.dtype for each in args[1:]))
            args = args[0], *(each.to(dtype) for each in args[1:])
        return function(*args, **options)


def _untraceable(denoiser: nn.Module, error: Exception) -> str:
    """Say in one line which module cannot be traced, where and why: read off the frames that the error passed."""
    names = {module: name for name, module in denoiser.named_modules()}
    torch_folder = str(Path(torch.__file__).parent)
    module, place = None, ""
    step = error.__traceback__
    while step is not None:
        owner, code = step.tb_frame.f_locals.get("self"), step.tb_frame.f_code
        if isinstance(owner, nn.Module) and owner in names:
            module = names[owner]
        if not code.co_filename.startswith(torch_folder) and code is not _Exportable.__torch_function__.__code__:
            line = " ".join(linecache.getline(code.co_filename, step.tb_lineno).split())
            place = f"{Path(code.co_filename).name}:{step.tb_lineno}" + (f", `{line[:80]}`" if line else "")
        step = step.tb_next
    where = f"module '{module}' ({place})" if module else f"its forward ({place})"
    what = f"torch.export cannot trace {type(denoiser).__name__}: {where}"
    if isinstance(error, GuardOnDataDependentSymNode):
        return f"{what} goes by the values of a tensor, but one graph must serve all inputs; not supported"
    if made := re.search(r"model attribute: guided\.denoiser\.([\w.]+)\.lifted_tensor", str(error)):
        return (
            f"torch.export cannot trace {type(denoiser).__name__}: module '{made[1]}' makes a table while it runs, "
            "which no graph keeps; not supported"
        )
    reason = " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__
    return f"{what}: {re.sub(r'/[^ :,]*/', '', reason)[:300]}"
