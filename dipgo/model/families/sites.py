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
_DOUBLE = _transformer("transformer_blocks", layers=_STREAMS)
_FLUX: Sites = {  # a single block's last projection takes its attention and its feed-forward along
    "block": (*_DOUBLE["block"], "single_transformer_blocks.*"),
    "branch": (*_DOUBLE["block"], "single_transformer_blocks.*"),
    "layer": (*_DOUBLE["layer"], "single_transformer_blocks.*.proj_out"),
}

_UNET: Sites = {
    "block": ("down_blocks.*", "mid_block", "up_blocks.*"),
    # A transformer reads its resnet's output alone: where it is skipped, nobody reads the resnet, which goes too.
    "branch": ("*_blocks.*.attentions|resnets.*", "*_blocks.*.*samplers.*", "mid_block"),
    "layer": (
        "*_blocks.*.resnets.*",
        "*_blocks.*.*samplers.*",
        "mid_block.resnets.*",
        *(
            f"{place}.attentions.*.transformer_blocks.*.{part}"
            for place in ("*_blocks.*", "mid_block")
            for part in ("attn1", "attn2", "ff")
        ),
        "conv_out",  # what a step is skipped whole by
    ),
}

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
    "UNet2DConditionModel": _UNET,
    "WanTransformer3DModel": _transformer("blocks", layers=("attn1", "attn2", "ffn")),
}
