"""AOTInductor packages of a bundle's graphs: compiled once on this machine, loaded without compiling.

A package is machine code and holds no weights: it is given those of the bundle, which all graphs share. Packages lie
below ``$XDG_CACHE_HOME/dipgo``, not in the bundle, because code from a bundle that others made must not run here.
"""

from __future__ import annotations

import platform
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from dipgo.base.errors import DipgoError
from dipgo.base.files import cache_root, new_file, sha256_of_json
from engines.torchrt.loader import TorchGraph, module_from_graph
from engines.torchrt.weights import Weights
from export.axes import shape_at, values_at
from export.bundle import Bundle
from export.records.bundle import BundleRecord
from export.records.graphs import AxisRecord, TensorRecord

RECIPE = 1  # raised whenever graphs are converted or compiled in another way, so that older packages are not used

_COMMAND = "dipgo build {} --backend torch-aot"
_ENDS: tuple[Literal["min", "opt", "max"], ...] = ("min", "opt", "max")


def build(
    bundle: Bundle,
    device: torch.device,
    force: bool = False,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Path]:
    """Compile every graph of a bundle that has no package yet, at all of :func:`sizes_built`; return the packages.

    Args:
        device: what the packages are to run on; it must be here.
        progress: wraps the list of what is to be compiled, in the order of what is returned.

    Raises:
        DipgoError: a graph that cannot be converted or compiled; the packages made before it stay.
    """
    weights = Weights(bundle.folder, device)
    inputs = inputs_by_file(bundle.record)
    calls = [(file, _shapes(inputs[file], sizes)) for sizes in sizes_built(bundle.record.axes) for file in inputs]
    different = [call for index, call in enumerate(calls) if call not in calls[:index]]  # not all have every axis
    packages = []
    for file, shapes in progress(different):
        graph = module_from_graph(bundle.folder / file, weights, shapes)
        path = package_path(bundle, file, graph)
        if force or not path.exists():
            with new_file(path) as draft:
                _compile(bundle.folder / file, graph, draft)
        packages.append(path)
    return packages


def sizes_built(axes: Mapping[str, AxisRecord]) -> list[dict[str, int]]:
    """Return the values of a bundle's axes that :func:`build` makes packages for: code is for fixed sizes.

    The smallest, the best and the largest sides of images, each with as many numbers of images: one image of the best
    size is the usual request.
    """
    sizes: list[dict[str, int]] = []
    for images, sides in product(_ENDS, _ENDS):
        batch = {name: value for name, value in values_at(axes, images).items() if name == "batch"}
        values = values_at(axes, sides) | batch
        if values not in sizes:
            sizes.append(values)
    return sizes


def load(bundle: Bundle, file: str, graph: TorchGraph) -> Callable[..., Sequence[torch.Tensor]]:
    """Return the function in a graph's package, on the weights of the graph.

    Raises:
        DipgoError: no package of this graph for these sizes, this torch and this device, or a damaged one.
    """
    path = package_path(bundle, file, graph)
    command = _COMMAND.format(bundle.folder)
    if not path.exists():
        shapes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in graph.inputs)
        raise DipgoError(
            f"{bundle.folder / file}: no AOTInductor package for {shapes} on {_machine(graph.device)} with torch "
            f"{torch.__version__}; {_cure(bundle, file, graph)}"
        )
    buffers = dict(graph.module.named_buffers())
    try:
        # Without the loader's own bookkeeping of streams, which cannot be captured into a CUDA graph.
        package = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        weights = {name: buffers[name] for name in package.get_constant_fqns()}
        package.load_constants(weights, check_full_update=True, user_managed=True)
    except (RuntimeError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise DipgoError(f"{path}: the package cannot be loaded ({detail}); run: {command} --force") from error
    lock = threading.Lock()

    def function(*arguments: torch.Tensor, _weights: Any = weights) -> Sequence[torch.Tensor]:
        with lock:
            results: Sequence[torch.Tensor] = package(*arguments)
        return results

    return function


def package_path(bundle: Bundle, file: str, graph: TorchGraph) -> Path:
    """Return where the package of a graph lies; its name follows from all that the machine code follows from."""
    shapes = [[tensor.name, str(tensor.dtype), list(tensor.shape)] for tensor in graph.inputs]
    checksum = bundle.record.files[file].sha256
    digest = sha256_of_json([RECIPE, checksum, shapes, torch.__version__, _machine(graph.device)])
    return cache_root() / "torch-aot" / f"{Path(file).stem}-{digest[:16]}.pt2"


def _shapes(inputs: Iterable[TensorRecord], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: shape_at(tensor.shape, sizes) for tensor in inputs}


def _cure(bundle: Bundle, file: str, graph: TorchGraph) -> str:
    """Say what to do for a package that is missing: building helps at the sizes that are built alone."""
    record = bundle.record
    inputs, sizes = inputs_by_file(record)[file], sizes_built(record.axes)
    shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
    if any(_shapes(inputs, values) == shapes for values in sizes):
        return f"run: {_COMMAND.format(bundle.folder)}"
    pixels = {name: 1 if name == "batch" else record.cell for name in record.axes}
    choices = [", ".join(f"{name} {value * pixels[name]}" for name, value in values.items()) for values in sizes]
    return f"packages are built for {'; '.join(choices)} alone: ask for one of these, or use --backend torch-compile"


def _compile(path: Path, graph: TorchGraph, target: Path) -> None:
    examples = tuple(torch.zeros(tensor.shape, dtype=tensor.dtype, device=graph.device) for tensor in graph.inputs)
    settings = {"aot_inductor.package_constants_in_so": False}
    if graph.device.type == "cuda":
        settings["max_autotune"] = True
    try:
        with torch.no_grad():
            program = torch.export.export(graph.module, examples)
        torch._inductor.aoti_compile_and_package(program, package_path=str(target), inductor_configs=settings)
    except Exception as error:  # compilers raise classes of their own
        detail = " ".join(str(error).split())[:300]
        raise DipgoError(f"{path}: AOTInductor cannot compile it ({detail}); is g++ installed?") from error


def inputs_by_file(record: BundleRecord, beside: bool = True) -> dict[str, list[TensorRecord]]:
    """Return the inputs of the loop's graphs and prologues; with ``beside`` of the text graph and the decoder too."""
    loaded = set(record.loaded)
    return {file: inputs for file, (inputs, _) in record.tensors.items() if beside or file in loaded}


def _machine(device: torch.device) -> str:
    """Name what machine code is made for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: *(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    name = model[1].strip() if model else platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
