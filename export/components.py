"""The parts of a pipeline beside its denoiser, as ONNX: modules built without weights, graphs that point into files.

A graph's initializers are bound to the component's own safetensors files before it is optimised; parameters are never
read, so that a text encoder of billions of them converts in little memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from torch.export import Dim

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoError
from dipgo.base.records import read_object
from dipgo.model.models import Model, component_class
from dipgo.model.random_weights import write_random
from dipgo.model.safetensors_index import Stored, checkpoint_files, stored_tensors
from dipgo.model.vae import to_vae
from export.bundle import DecoderRecord, Size
from export.onnx.convert import convert, simplify, tensor_record
from export.onnx.symbols import name_axes
from export.onnx.weights import Weights, bind, cast

VAE = "vae"
DECODER_FILE = "vae_decoder.onnx"
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # of the weights files, by library
_EXAMPLE_SIZE = 6  # of an axis; torch.export takes 0 and 1 for constants
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of a VAE's attention


def decoder_to_onnx(
    model: Model, latent_shape: Sequence[Size], dtype: torch.dtype, weights: Weights | None = None
) -> tuple[ir.Model, DecoderRecord] | None:
    """Convert the VAE's decoder: ``latent [B, C, H, W]`` float32 to ``pixels [B, channels, height, width]`` float32.

    ``latent_shape`` has the name of an axis where a size is chosen at run time. Pixels are in [0, 1]. It
    computes in ``dtype``, or in float32 where the pipeline does so (:func:`component_dtype`). ``weights`` None takes
    the folder's own, as they are.

    Returns:
        The graph and its record; None for a pipeline without a VAE.

    Raises:
        DipgoError: a folder that is incomplete or damaged, or weights of another model or dtype.
    """
    if VAE not in components_of(model):
        return None
    vae = empty_component(model, VAE, dtype)
    example = torch.zeros([size if isinstance(size, int) else _EXAMPLE_SIZE for size in latent_shape])
    free = {axis: Dim.AUTO for axis, size in enumerate(latent_shape) if not isinstance(size, int)}
    graph = convert(
        "the VAE decoder",
        _Decoder(vae, component_dtype(model, VAE, dtype)),
        [example],
        ["latent"],
        ["pixels"],
        optimize=False,
        dynamic=(free,) if free else None,
    )
    if free:
        name_axes(graph, "latent", latent_shape)
    bind_component(graph, "vae.", model, vae, weights or own_weights(model, VAE))
    finish(graph, "vae_decoder")
    return graph, DecoderRecord(
        file=DECODER_FILE, input=tensor_record(graph.graph.inputs[0]), output=tensor_record(graph.graph.outputs[0])
    )


class _Decoder(nn.Module):
    """Latent to pixels in [0, 1], as diffusers pipelines do it; scaling in float32, the network in ``dtype``."""

    def __init__(self, vae: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae = vae
        self.dtype = dtype

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        pixels = self.vae.decode(to_vae(latent, self.vae.config).to(self.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def components_of(model: Model) -> tuple[str, ...]:
    """Return the components that a bundle holds beside the denoiser, those that the pipeline has: VAE, text encoders.

    Text encoders whose folder is missing (an architecture) are left out, all of them.
    """
    prompting = model.family.prompting(model.config)
    encoders = [name for name in (prompting.encoders if prompting else ()) if class_of(model, name)]
    if not all((model.folder / name).is_dir() for name in encoders):
        encoders = []
    return (*([VAE] if class_of(model, VAE) else []), *encoders)


def class_of(model: Model, name: str) -> tuple[str, str] | None:
    """Return the library and the class of a component as ``model_index.json`` has them; None where there is none."""
    found = component_class(read_object(model.folder / "model_index.json", "model_index.json"), name)
    return found if found[1] else None


def component_dtype(model: Model, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a component computes: ``dtype``, but float32 for a VAE that the pipeline upcasts."""
    if name != VAE or not model.family.upcasts_vae(model.config):
        return dtype
    return torch.float32 if component_config(model, name).get("force_upcast") else dtype


def component_config(model: Model, name: str) -> dict[str, Any]:
    """Return a component's configuration.

    Raises:
        DipgoError: no such file, or one that is not JSON.
    """
    return read_object(model.folder / name / "config.json", f"configuration of the {name}")


def empty_component(model: Model, name: str, dtype: torch.dtype) -> Any:
    """Return a component with its buffers but with weights that were never read or allocated, in evaluation mode.

    Weights have the dtypes with which ``from_pretrained(torch_dtype=…)`` would load them: some stay in float32.

    Raises:
        DipgoError: a class that neither diffusers nor transformers has, or a configuration that does not fit it.
    """
    from accelerate import init_empty_weights

    library, class_name = class_of(model, name) or ("", "")
    module_class = getattr(importlib.import_module(library), class_name, None) if library in _STEMS else None
    if module_class is None:
        raise _foreign(model, name, library, class_name)
    config = component_config(model, name)
    try:
        with init_empty_weights(include_buffers=False):
            if library == "diffusers":
                module = module_class.from_config(config)
            else:
                module = module_class(module_class.config_class.from_dict(config))
    except Exception as error:  # whatever a constructor may raise
        detail = " ".join(str(error).split())[:160]
        raise DipgoError(f"{model.folder / name}: not a configuration of {class_name} ({detail})") from error
    dtype = component_dtype(model, name, dtype)
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for path, part in module.named_modules():
        for own, parameter in list(part.named_parameters(recurse=False)):
            held = torch.float32 if kept.intersection([*path.split("."), own]) else dtype
            # Pages of a fresh allocation that nobody touches take no memory (as in Model.empty_denoiser).
            setattr(part, own, nn.Parameter(torch.empty(parameter.shape, dtype=held), requires_grad=False))
    return module.eval()


def _foreign(model: Model, name: str, library: str, class_name: str) -> DipgoError:
    return DipgoError(
        f"{model.folder / 'model_index.json'}: the {name} is a {class_name} of '{library}', which is not "
        "installed here; only classes of diffusers and transformers can be exported"
    )


def parameters_of(model: Model, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a component's parameters, by their names in memory."""
    module = empty_component(model, name, torch.float32)
    return {parameter: tuple(value.shape) for parameter, value in module.named_parameters()}


def own_weights(model: Model, name: str) -> Weights:
    """Return where a component's tensors lie in the pipeline's own folder.

    Raises:
        DipgoError: no safetensors files there, or damaged ones; a class of another library.
    """
    folder = model.folder / name
    files = _files(model, name)
    if not files:
        raise DipgoError(f"{folder}: no safetensors weights in it; download or save the pipeline again")
    return Weights(stored_tensors(files), model.folder)


def _files(model: Model, name: str) -> list[Path]:
    library, class_name = class_of(model, name) or ("diffusers", "")
    if library not in _STEMS:
        raise _foreign(model, name, library, class_name)
    return checkpoint_files(model.folder / name, _STEMS[library], model.variant)


def _is_drawn(model: Model, name: str) -> bool:
    return model.random_weights and name in (VAE, model.family.component) and not _files(model, name)


def weights_in_place(model: Model, name: str, dtype: torch.dtype) -> Weights | None:
    """Return a component's own weights; None where headers tell that its graph wants others, cast or drawn ones."""
    if _is_drawn(model, name):
        return None
    own, kind = own_weights(model, name), Dtype.of_torch(component_dtype(model, name, dtype))
    return own if any(stored.dtype == kind for stored in own.tensors.values()) else None


def weights_of(model: Model, name: str, dtype: torch.dtype, folder: Path) -> Weights:
    """Return where a component's tensors lie, with the dtypes that its graph wants.

    Its own files, if they have these dtypes. Else they are cast, and where a model has random weights drawn, into files
    in ``folder/<component>``.

    Raises:
        DipgoError: no weights, damaged ones, weights of another model, or a class of another library.
    """
    if _is_drawn(model, name):
        drawn = Dtype.of_torch(component_dtype(model, name, dtype))
        path = folder / name / f"random-{drawn.safetensors}.safetensors"
        write_random(parameters_of(model, name), drawn, path)
        return Weights(stored_tensors([path]), folder)
    own = own_weights(model, name)
    module = empty_component(model, name, dtype)
    wanted = {
        stored: Dtype.of_torch(module.get_parameter(parameter).dtype)
        for parameter, stored in checkpoint_names(model, module, own.tensors).items()
        if stored in own.tensors
    }
    if all(own.tensors[stored].dtype == kind for stored, kind in wanted.items()):
        return own
    tensors: dict[str, Stored] = {}
    for kind in sorted(set(wanted.values()), key=lambda kind: kind.safetensors):
        names = [stored for stored, other in wanted.items() if other == kind]
        tensors |= cast(own.tensors, names, kind, folder, name)
    return Weights(tensors, folder)


def checkpoint_names(model: Model, module: Any, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Map a component's parameters to tensors of its checkpoint, which an older library may have named.

    Tried in order: the name itself, that of a parameter tied to it, either with or without a prefix, and a VAE's
    attention as it used to be called. A parameter that is nowhere is mapped to its own name.
    """
    prompting = model.family.prompting(model.config)
    prefixes = [*(prompting.prefixes if prompting else ()), f"{getattr(module, 'base_model_prefix', '')}."]
    ties = _ties(module)
    names = {}
    for name, _ in module.named_parameters(remove_duplicate=False):
        forms = [name, *ties.get(name, ())]
        forms += [f"{prefix}{form}" for prefix in prefixes for form in forms]
        forms += [form.removeprefix(prefix) for prefix in prefixes for form in forms]
        part, _, leaf = name.rpartition(".")
        for new, old in _OLD_NAMES.items():
            if part.endswith(f".{new}"):
                forms.append(f"{part.removesuffix(new)}{old}.{leaf}")
        names[name] = next((form for form in forms if form in tensors), name)
    return names


def _ties(module: Any) -> dict[str, list[str]]:
    """Return the other names of parameters that share their values, as transformers' classes declare them."""
    declared = getattr(module, "_tied_weights_keys", None) or {}
    if not isinstance(declared, Mapping):  # before transformers 5: names alone, all tied to the input embeddings
        embeddings = module.get_input_embeddings()
        source = next(name for name, part in module.named_modules() if part is embeddings)
        declared = dict.fromkeys(declared, f"{source}.weight")
    ties: dict[str, list[str]] = {}
    for alias, source in declared.items():
        ties.setdefault(alias, []).append(source)
        ties.setdefault(source, []).append(alias)
    return ties


def bind_component(graph: ir.Model, prefix: str, model: Model, module: Any, weights: Weights) -> None:
    """Point the initializers ``<prefix><parameter of module>`` into the component's files.

    Raises:
        DipgoError: a tensor that is missing, or has another shape or dtype than the graph wants.
    """
    names = checkpoint_names(model, module, weights.tensors)
    bind(graph, {f"{prefix}{name}": stored for name, stored in names.items()}, weights.tensors, weights.root)


def finish(graph: ir.Model, name: str) -> None:
    """Optimise a bound graph, drop the exporter's notes and name it."""
    ClearMetadataAndDocStringPass()(graph)
    simplify(graph)
    graph.graph.name = name
    graph.producer_name = "dipgo"
