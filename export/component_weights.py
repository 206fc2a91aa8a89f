"""Where the weights of a pipeline's components lie, under the names and in the dtypes that their graphs want."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoError
from dipgo.base.safetensors_index import Stored, checkpoint_files, stored_tensors
from dipgo.model.models import Model
from dipgo.model.random_weights import write_random
from export.components import LIBRARIES, VAE, class_of, component_dtype, empty_component, foreign, parameters_of
from export.onnx.weights import Weights, bind, cast

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # of the weights files, by library
_ROOTS = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")  # of language models
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of a VAE's attention


def own_weights(model: Model, name: str) -> Weights:
    """Return where a component's tensors lie in the pipeline's own folder; of the denoiser those of ControlNets too.

    Raises:
        DipgoError: no safetensors files there, or damaged ones; a class of another library.
    """
    folder = model.folder / name
    files = _files(model, name)
    if not files:
        raise DipgoError(f"{folder}: no safetensors weights in it; download or save the pipeline again")
    return Weights(model.tensors if name == model.family.component else stored_tensors(files), model.folder)


def _files(model: Model, name: str) -> list[Path]:
    library, class_name = class_of(model, name) or ("diffusers", "")
    if library not in LIBRARIES:
        raise foreign(model, name, library, class_name)
    return checkpoint_files(model.folder / name, _STEMS[library], model.variant)


def _is_drawn(model: Model, name: str) -> bool:
    """Whether weights are drawn, as :meth:`Model.pipeline` does: a denoiser's always, a VAE's that are not there."""
    return model.random_weights and (name == model.family.component or (name == VAE and not _files(model, name)))


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
        precision = Dtype.of_torch(component_dtype(model, name, dtype))
        path = folder / name / f"random-{precision.safetensors}.safetensors"
        write_random(parameters_of(model, name), precision, path)
        return Weights(stored_tensors([path]), folder)
    own = own_weights(model, name)
    whole = name == model.family.component and model.family.whole
    module = model.empty_denoiser(dtype) if whole else empty_component(model, name, dtype)
    dtypes = {
        stored: Dtype.of_torch(module.get_parameter(parameter).dtype)
        for parameter, stored in checkpoint_names(model, module, own.tensors).items()
        if stored in own.tensors
    }
    if all(own.tensors[stored].dtype == kind for stored, kind in dtypes.items()):
        return own
    tensors: dict[str, Stored] = {}
    for kind in sorted(set(dtypes.values()), key=lambda kind: kind.safetensors):
        names = [stored for stored, other in dtypes.items() if other == kind]
        tensors |= cast(own.tensors, names, kind, folder, name)
    return Weights(tensors, folder)


def checkpoint_names(model: Model, module: Any, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Map a component's parameters to tensors of its checkpoint, which an older library may have named.

    Tried in order: the name itself, with or without a prefix, a VAE's attention as it used to be called, a language
    model's layers below another root; then the same of a parameter tied to it, which is declared also where a
    configuration unties them. A parameter that is nowhere is mapped to its own name.
    """
    prompting = model.family.prompting(model.config)
    prefixes = [*(prompting.prefixes if prompting else ()), f"{getattr(module, 'base_model_prefix', '')}."]
    ties = _ties(module)

    def forms_of(name: str) -> list[str]:
        forms = [name, *(f"{prefix}{name}" for prefix in prefixes), *(name.removeprefix(prefix) for prefix in prefixes)]
        part, _, leaf = name.rpartition(".")
        forms += [
            f"{part.removesuffix(new)}{old}.{leaf}" for new, old in _OLD_NAMES.items() if part.endswith(f".{new}")
        ]
        rest = name.removeprefix(next(root for root in _ROOTS if name.startswith(root)))
        return forms + [f"{root}{rest}" for root in _ROOTS if rest != name]

    names = {}
    for name, _ in module.named_parameters(remove_duplicate=False):
        forms = [form for each in (name, *ties.get(name, ())) for form in forms_of(each)]
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
