"""Models: find and load a diffusers pipeline by built-in name, folder or hub id, and fingerprint it.

Two kinds ship with the package: small trained models (``zoo``), and public architectures at their true sizes without
weights (``architectures``), for counting, for importing what others publish, and, with random weights, for speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dipgo.base.errors import DipgoError, UsageError, one_line
from dipgo.base.records import read_object
from dipgo.model import hub
from dipgo.model.checks import check_index, check_latent, check_lora, component_class, refuse_pickled
from dipgo.model.families import COMPONENTS, observed_family, registered_family
from dipgo.model.families.controlnet import CONTROLNET, KINDS, NETS, check_nets
from dipgo.model.model import Model
from dipgo.model.settings import own_settings

__all__ = ["ARCHITECTURES", "BUILT_IN", "Model", "architectures", "built_in", "find_model"]

BUILT_IN = Path(__file__).parents[1] / "zoo"
ARCHITECTURES = Path(__file__).parents[1] / "architectures"


def built_in() -> list[str]:
    """Return the names of the models that ship with the package."""
    return sorted(path.parent.name for path in BUILT_IN.glob("*/model_index.json"))


def architectures() -> list[str]:
    """Return the names of the architectures that ship with the package, without weights."""
    return sorted(path.parent.name for path in ARCHITECTURES.glob("*/model_index.json"))


def find_model(name: str, random_weights: bool = False, pixels: tuple[int, int] | None = None) -> Model:
    """Find MODEL: a built-in name, a local diffusers folder, or a hub id.

    Of a hub id the configurations are downloaded and judged before the weights, and of these one variant. An
    architecture is found too: all works on it that needs no weights; with ``random_weights`` the rest as well.
    ``pixels`` is the height and width of images where a pipeline is observed: its tables may be for one size alone. A
    built-in model has the size of its VAE's pictures by default, which its pipeline may not know.
    A checkpoint may lie in shards; of variants beside each other (``.fp16.``) the one without a suffix is taken (see
    :attr:`Model.weights_files`).

    Raises:
        DipgoError: no such model, or a folder that is incomplete or damaged.
        UsageError: a denoiser that takes more than a latent and conditions, or conditions that cannot be guessed; an
            add-on (ControlNet, IP-Adapter, LoRA that is not fused).
    """
    folder = _locate(name)
    if pixels is None and folder.parent == BUILT_IN:
        pixels = _made_for(folder)
    model = _read(name, folder, random_weights, pixels)
    if random_weights or folder.parent == ARCHITECTURES:
        return model
    if folder != Path(name) and folder.parent != BUILT_IN:
        index = read_object(folder / "model_index.json", "model_index.json")
        model = replace(model, folder=hub.fetch_weights(name, index, model.family.component))
    if not model.weights_files:
        refuse_pickled(model.folder)
        folder = model.folder / model.family.component
        raise DipgoError(f"{folder}: no safetensors weights in it; download or save it again")
    check_lora(model.folder, model.tensors)
    return model


def _read(name: str, folder: Path, random_weights: bool, pixels: tuple[int, int] | None) -> Model:
    """Read a folder's configurations, and refuse what they tell of."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise DipgoError(f"{folder}: no model_index.json in it; give a folder saved by a pipeline's save_pretrained")
    index = read_object(index_file, "model_index.json")
    component = next((name for name in COMPONENTS if component_class(index, name)[0] == "diffusers"), None)
    if component is None:
        raise DipgoError(f"{index_file}: {index.get('_class_name')} has no {' or '.join(COMPONENTS)} of diffusers")
    config_file, class_name = folder / component / "config.json", component_class(index, component)[1]
    config = read_object(config_file, "model configuration")
    if component_class(index, "scheduler")[1] and not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise DipgoError(f"{folder}: no scheduler/scheduler_config.json in it; download or save the pipeline again")
    nets = _nets(folder, index)
    check_index(index_file, index, config, ["controlnet"] if nets else [])
    try:
        family = registered_family(class_name, component, str(index.get("_class_name")), len(nets))
        if family is None:
            return Model(name, folder, observed_family(folder, component, pixels), config, random_weights)
        if nets:
            check_nets(config, nets, str(folder))
            if random_weights:
                raise UsageError(
                    f"{folder}: random weights are not drawn for a ControlNet; give a folder that has them"
                )
            config |= {NETS: nets}
        check_latent(index_file, config)
        family.example(config, 1)  # refuses what cannot be conditioned
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DipgoError(
            f"{config_file}: not a configuration of {class_name} ({type(error).__name__}: {one_line(error)}); "
            "download or save the pipeline again"
        ) from error
    return Model(name, folder, family, config, random_weights)


def _nets(folder: Path, index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of a pipeline's ControlNets; none of a pipeline that has none, or others than are known."""
    from diffusers import ControlNetModel

    kind = component_class(index, "controlnet")[1]
    if kind not in KINDS or index.get("_class_name") not in CONTROLNET.pipelines:
        return []
    folders = [folder / "controlnet"]
    if kind != KINDS[0]:
        folders += sorted(folder.glob("controlnet_[0-9]"))
    read = (read_object(each / "config.json", "configuration of the ControlNet") for each in folders)
    return [own_settings(ControlNetModel, config) for config in read]


def _locate(name: str) -> Path:
    """Return a model's folder; of a hub id one that holds its configurations."""
    if name in built_in():
        return BUILT_IN / name
    if name in architectures():
        return ARCHITECTURES / name
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise DipgoError(
            f"{name}: a file; make a pipeline of a checkpoint first: dipgo import-checkpoint {name} -o FOLDER"
        )
    if not hub.is_hub_id(name):
        raise DipgoError(f"no model '{name}': neither built in ({_shipped()}) nor a folder")
    return hub.fetch_configurations(name)


def _made_for(folder: Path) -> tuple[int, int]:
    """Return the size of the pictures that the VAE in a folder learned from."""
    side = int(read_object(folder / "vae" / "config.json", "VAE configuration")["sample_size"])
    return side, side


def _shipped() -> str:
    return ", ".join([*built_in(), *architectures()])
