"""The sites of denoisers whose pipelines are observed: module name patterns by class and granularity."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

Sites = Mapping[str, tuple[str, ...]]


def _transformer(*kinds: str, layers: tuple[str, ...], output: str = "proj_out") -> Sites:
    """Return the sites of a transformer whose blocks lie in the lists ``kinds``; ``output`` ends every call."""
    blocks = tuple(f"{kind}.*" for kind in kinds)
    return {
        "block": blocks,
        "branch": blocks,
        "layer": (*(f"{kind}.*.{layer}" for kind in kinds for layer in layers), output),
    }


def sites_of_lists(denoiser: nn.Module) -> Sites:
    """Return the blocks of a denoiser that has no entry here: what lies in its lists of modules of one class."""
    lists = [(name, part) for name, part in denoiser.named_children() if isinstance(part, nn.ModuleList)]
    blocks = tuple(f"{name}.*" for name, part in lists if part and not isinstance(part[0], nn.Linear))
    return {"block": blocks} if blocks else {}


_STREAMS = ("attn", "ff", "ff_context")  # of double blocks: joint attention, and a feed-forward for each stream
_FLUX = _transformer("transformer_blocks", "single_transformer_blocks", layers=(*_STREAMS, "attn|proj_mlp|proj_out"))

OBSERVED: dict[str, Sites] = {
    "AuraFlowTransformer2DModel": _transformer(
        "joint_transformer_blocks", "single_transformer_blocks", layers=(*_STREAMS,)
    ),
    "ChromaTransformer2DModel": _FLUX,
    "CogView4Transformer2DModel": _transformer("transformer_blocks", layers=("attn1",)),
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _transformer("transformer_blocks", "single_transformer_blocks", layers=_STREAMS),
    "HunyuanDiT2DModel": _transformer("blocks", layers=("attn1", "attn2", "ff")),
    "Lumina2Transformer2DModel": _transformer("layers", layers=("attn", "feed_forward"), output="norm_out"),
    "QwenImageTransformer2DModel": _transformer("transformer_blocks", layers=("attn", "img_mlp", "txt_mlp")),
    "SanaTransformer2DModel": _transformer("transformer_blocks", layers=("attn1", "attn2", "ff")),
    "SD3Transformer2DModel": _transformer("transformer_blocks", layers=_STREAMS),
    "WanTransformer3DModel": _transformer("blocks", layers=("attn1", "attn2", "ffn")),
}
