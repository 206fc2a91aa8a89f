"""LoRA files: whose layers they change, by diffusers', peft's and kohya's names of them. Free of torch.

What these names do not tell goes through diffusers' own conversion, where that is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.safetensors_index import Stored, read_file
from export.records.bundle import AdaptersRecord

FILE = "pytorch_lora_weights.safetensors"
_ENDS = re.compile(
    r"[._](?:(?P<down>lora_A\.(?:default\.)?weight|lora_down\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight)"
    r"|(?P<up>lora_B\.(?:default\.)?weight|lora_up\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight)"
    r"|(?P<alpha>alpha))$"
)
_STARTS = re.compile(r"^(base_model\.model\.|unet\.|transformer\.|lora_unet_|lora_transformer_)+")
_TEXT = re.compile(r"^(text_encoder|text_model|lora_te|te[123]?[._])")
_BLOCKS = re.compile(r"^(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(?=transformer|proj_)")


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds at a layer: W x becomes W x + scale · (x A) B.

    Attributes:
        down: A, float32 ``[in, rank]``.
        up: B, float32 ``[rank, out]``.
        scale: alpha over the rank.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[1]


Adapter = dict[str, LowRank]
"""By layers of the denoiser."""


def read_adapter(source: Any, weight_name: str | None, adapters: AdaptersRecord) -> Adapter:
    """Read a LoRA: a safetensors file, a folder that holds one, or its tensors by name.

    Raises:
        UsageError: no such file, names that fit no layer of the bundle, shapes of another model.
        DipgoError: no safetensors file.
    """
    if isinstance(source, Mapping):
        from engines.pipeline.formats import to_array

        return _adapter("the adapter", {str(name): to_array(value) for name, value in source.items()}, {}, adapters)
    path = Path(source)
    path = path / (weight_name or FILE) if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a LoRA's safetensors file")
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: no safetensors file, and nothing is unpickled; save the LoRA as safetensors")
    tensors = {name: _array(stored) for name, stored in read_file(path).items()}
    return _adapter(str(path), tensors, _config(path), adapters)


def _array(stored: Stored) -> np.ndarray:
    kind = np.dtype("<u2") if stored.dtype is Dtype.BFLOAT16 else stored.dtype.numpy
    values = np.fromfile(stored.file, kind, stored.length // np.dtype(kind).itemsize, offset=stored.offset)
    if stored.dtype is Dtype.BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(stored.shape).astype(np.float32)


def _config(path: Path) -> dict[str, Any]:
    """Return what diffusers says of an adapter beside its tensors; it has alphas of files that have none as tensors."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise DipgoError(f"{path}: its metadata are no JSON; save the LoRA again") from error
    return {re.sub(r"^(unet|transformer)\.", "", name): value for name, value in config.items()}


def _adapter(
    where: str, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], adapters: AdaptersRecord
) -> Adapter:
    layers = {branch.layer: branch for branch in adapters.branches}
    text = [name for name in tensors if _TEXT.match(name)]
    if text:
        raise UsageError(
            f"{where}: changes the text encoder ({_some(text)}), which a bundle takes no adapters at; fuse it into the "
            "pipeline and give that to 'dipgo reweight'"
        )
    parts, strange = _parts(tensors, layers)
    if strange and find_spec("torch") and find_spec("diffusers"):
        converted = _by_diffusers(tensors, layers)
        if converted is not None:
            parts, strange = _parts(converted, layers)
    if strange or not parts:
        raise UsageError(
            f"{where}: {_some(strange) if strange else 'nothing'} fits no linear layer of the bundle; fuse it into the "
            "pipeline and give that to 'dipgo reweight'"
        )
    sizes = {tensor.name: tensor.shape for tensor in adapters.inputs}
    adapter: Adapter = {}
    for layer, part in parts.items():
        if not {"down", "up"} <= part.keys():
            raise UsageError(f"{where}: holds one matrix alone of '{layer}'; save the LoRA again")
        down, up = (
            part[side].reshape(part[side].shape[:2]) if part[side].ndim > 1 else part[side][None]
            for side in ("down", "up")
        )
        width, height = sizes[layers[layer].down][1], sizes[layers[layer].up][2]
        if part["down"].size != down.size or (down.shape[1], *up.shape) != (width, height, len(down)):
            raise UsageError(
                f"{where}: '{layer}' has matrices {list(part['down'].shape)} and {list(part['up'].shape)}, the "
                f"bundle's layer takes {width} and gives {height}; give a LoRA of this model"
            )
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise UsageError(f"{where}: '{layer}' holds infinity or NaN; save the LoRA again")
        rank = len(down)
        alpha = float(part["alpha"].reshape(-1)[0]) if "alpha" in part else _alpha(config, layer, rank)
        adapter[layer] = LowRank(np.ascontiguousarray(down.T), np.ascontiguousarray(up.T), alpha / rank)
    return adapter


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return alpha where no tensor says it; without a word of it, it is the rank."""
    patterns = config.get("alpha_pattern") or {}
    own = next((value for name, value in patterns.items() if layer == name or layer.endswith(f".{name}")), None)
    return float(own if own is not None else config.get("lora_alpha") or rank)


def _parts(
    tensors: Mapping[str, np.ndarray], layers: Iterable[str]
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return down, up and alpha by layer, and the names of tensors that fit none."""
    known = {layer: layer for layer in layers} | {layer.replace(".", "_"): layer for layer in layers}
    parts: dict[str, dict[str, np.ndarray]] = {}
    strange = []
    for name, tensor in tensors.items():
        match = _ENDS.search(name)
        stem = _STARTS.sub("", name[: match.start()]) if match else ""
        stem = stem.replace(".processor.", ".").removesuffix("_lora")
        layer = next((known[form] for form in (stem, f"{stem}.0", _BLOCKS.sub(_block, stem)) if form in known), None)
        if match is None or layer is None or match.lastgroup is None:
            strange.append(name)
        else:
            parts.setdefault(layer, {})[match.lastgroup] = tensor
    return parts, strange


def _block(match: re.Match[str]) -> str:
    """Return a block of SDXL as diffusers names it, for the name that Stability's code has for it."""
    kind, number = match[1], int(match[2])
    if kind == "middle_block":
        return "mid_block_attentions_0_"
    side, first = ("down", number - 1) if kind == "input_blocks" else ("up", number)
    return f"{side}_blocks_{first // 3}_attentions_{first % 3}_"


def _by_diffusers(tensors: Mapping[str, np.ndarray], layers: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Return the tensors by the names that diffusers gives them; None where it does not know them either."""
    import torch
    from diffusers import loaders

    is_unet = any(layer.startswith("down_blocks.") for layer in layers)
    loader = loaders.StableDiffusionXLLoraLoaderMixin if is_unet else loaders.FluxLoraLoaderMixin
    options = {} if is_unet else {"return_alphas": True}
    try:
        state, alphas = loader.lora_state_dict(
            {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}, **options
        )
    except Exception:  # whatever a conversion may raise of names that it does not know
        return None
    converted = {name: value.float().numpy() for name, value in state.items()}
    return converted | {name: np.array(float(alpha)) for name, alpha in (alphas or {}).items()}


def _some(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
