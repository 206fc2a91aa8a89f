"""Checkpoints in one file, as they are shared for Stable Diffusion: made into a pipeline's folder by diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dipgo.base.errors import DipgoError, UsageError, one_line
from dipgo.base.files import new_folder, refuse_existing
from dipgo.base.records import read_object
from dipgo.base.safetensors_index import Stored, stored_tensors
from dipgo.model.checks import component_class
from dipgo.model.models import ARCHITECTURES, architectures

TOKENIZER = "openai/clip-vit-large-patch14"  # what all three models split prompts by
_CLIP = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
    "projection_dim": 768,
}
_VIT_L = _CLIP | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VIT_H = _CLIP | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_BIG_G = _CLIP | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
ENCODERS: dict[str, dict[str, dict[str, Any]]] = {
    "sd-1.5": {"text_encoder": _VIT_L | {"hidden_act": "quick_gelu"}},
    "sd-2.1": {"text_encoder": _VIT_H | {"hidden_act": "gelu", "projection_dim": 512}},
    "sdxl": {
        "text_encoder": _VIT_L | {"hidden_act": "quick_gelu"},
        "text_encoder_2": _BIG_G | {"hidden_act": "gelu", "projection_dim": 1280},
    },
}
_WIDTHS = {768: "sd-1.5", 1024: "sd-2.1", 2048: "sdxl"}  # of what cross-attention reads
_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
_CROSS_ATTENTION = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"


def import_checkpoint(file: Path, folder: Path, like: str | None = None, tokenizer: str | None = None) -> str:
    """Write the pipeline of a checkpoint of Stable Diffusion 1, 2 or SDXL as a folder, offline but for a tokenizer.

    Weights keep the precision that most of them have in the file.

    Args:
        file: safetensors, as its authors' own code reads it; nothing is unpickled.
        folder: where to write.
        like: the architecture or folder whose configurations, scheduler included, are the checkpoint's; None tells the
            architecture by the file's tensors.
        tokenizer: folder or hub id of CLIP's tokenizer, where ``like`` brings none.

    Returns:
        The name of the architecture.

    Raises:
        UsageError: a file of another model or kind, or a tokenizer that is not to be had.
        DipgoError: a damaged file.
    """
    import diffusers

    refuse_existing(folder, False)
    if file.suffix != ".safetensors":
        raise UsageError(f"{file}: not a .safetensors file, and nothing else is read; save its state dict as one")
    tensors = stored_tensors([file])
    name = like or _architecture(file, tensors)
    source = ARCHITECTURES / name if name in architectures() else Path(name)
    index = read_object(source / "model_index.json", "model_index.json")
    pipeline: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if not hasattr(pipeline, "from_single_file"):
        raise UsageError(f"{name}: diffusers reads no single file of a {index.get('_class_name')}")
    with TemporaryDirectory() as scratch:
        configurations = _configurations(source, name, Path(scratch) / "configurations")
        components = _tokenizers(source, index, tokenizer) | _left_out(index)
        try:
            pipe = pipeline.from_single_file(
                str(file),
                config=str(configurations),
                local_files_only=True,
                dtype=_most_common(tensors).torch,
                **components,
            )
        except Exception as error:  # diffusers raises many kinds for tensors that are missing or of other shapes
            raise DipgoError(f"{file}: not a checkpoint like {name} ({one_line(error)})") from error
    with new_folder(folder) as draft:
        pipe.save_pretrained(draft)
    return name


def _architecture(file: Path, tensors: Mapping[str, Stored]) -> str:
    """Return which built-in architecture a checkpoint is of."""
    if _INPUT not in tensors:
        raise UsageError(f"{file}: holds no checkpoint of Stable Diffusion 1, 2 or SDXL; give a folder of diffusers")
    channels = tensors[_INPUT].shape[1]
    if channels != 4:
        raise UsageError(f"{file}: its UNet takes {channels} channels (inpainting, depth, editing), not supported")
    # SDXL begins with a level without attention.
    keys = [key for block in (1, 4) if (key := _CROSS_ATTENTION.format(block)) in tensors]
    width = tensors[keys[0]].shape[-1] if keys else None
    if width not in _WIDTHS:
        raise UsageError(f"{file}: its UNet reads prompts of width {width}: none of {', '.join(_WIDTHS.values())}")
    return _WIDTHS[width]


def _configurations(source: Path, name: str, folder: Path) -> Path:
    """Copy a model's configurations, and add those of text encoders that an architecture comes without."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "tokenizer*"))
    for encoder, config in ENCODERS.get(name, {}).items():
        (folder / encoder).mkdir(exist_ok=True)
        (folder / encoder / "config.json").write_text(
            json.dumps({"bos_token_id": 49406, "eos_token_id": 49407} | config)
        )
    return folder


def _left_out(index: Mapping[str, Any]) -> dict[str, None]:
    """Return the components that no checkpoint holds, as from_single_file takes them."""
    return {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}


def _tokenizers(source: Path, index: Mapping[str, Any], tokenizer: str | None) -> dict[str, Any]:
    import transformers

    tokenizers = {}
    for component in ("tokenizer", "tokenizer_2"):
        class_name = component_class(index, component)[1]
        if not class_name:
            continue
        own = source / component
        place = tokenizer or (str(own) if own.is_dir() else TOKENIZER)
        padding = {"pad_token": "!"} if component == "tokenizer_2" and not own.is_dir() else {}
        try:
            loaded = getattr(transformers, class_name).from_pretrained(place, **padding)
            if not own.is_dir() and len(loaded) != _CLIP["vocab_size"]:  # of an empty folder one comes, too
                raise ValueError(f"{len(loaded)} tokens, not {_CLIP['vocab_size']}")
            tokenizers[component] = loaded
        except Exception as error:  # offline, not found, damaged: each library has kinds of its own
            raise UsageError(
                f"the tokenizer is not to be had from {place} ({one_line(error)}); give --tokenizer FOLDER, one with "
                "vocab.json and merges.txt of CLIP"
            ) from error
    return tokenizers


def _most_common(tensors: Mapping[str, Stored]) -> Any:
    sizes: dict[Any, int] = {}
    for stored in tensors.values():
        sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.length
    return max(sizes, key=lambda dtype: sizes[dtype])
