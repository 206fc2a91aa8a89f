"""Every option of an export, once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dipgo.base.config import Config


class ExportConfig(Config):
    """How a bundle is made."""

    graphs: Literal["signature", "segment", "step"] = Field(
        "signature",
        description="signature: one graph a set of computed sites; segment: every block in one graph; step.",
    )
    max_graphs: int | None = Field(None, ge=1, description="Merge signatures down to as many, at the least added MACs.")
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="fp32, fp16 or bf16.")
    batch: str = Field("1", description="Images a call: a number, or a range: min:max, min:opt:max.")
    size: str | None = Field(
        None,
        description="Of images in pixels: SIZE or HEIGHTxWIDTH, each a number or a range; the model's by default.",
    )
    image: bool = Field(False, description="Also for requests that start from pictures: with the VAE's encoder.")
    weights: Literal["copy", "in-place"] = Field(
        "copy",
        description="copy: a bundle of its own; in-place: graphs in the pipeline's folder, nothing copied.",
    )
    unguided: bool = Field(
        False, description="Also a program of one pass for each, which requests at a guidance scale up to 1 run."
    )
    lora_rank: int = Field(
        0, ge=0, le=1024, description="Take LoRAs per request, of ranks up to this together; 0 takes none."
    )
    pipeline: bool = Field(
        True,
        description="With text encoders and VAE decoder, or without.",
        json_schema_extra={"flags": ["--pipeline/--denoiser"]},
    )
