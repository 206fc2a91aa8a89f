"""The model card of a bundle: what it is, what made it, and how it is run."""

from __future__ import annotations

from export.records.bundle import BundleRecord

_TASKS = {
    "prompt": "text-to-image",
    "class": "unconditional-image-generation",
    "nothing": "unconditional-image-generation",
}
_ARGUMENTS = {"prompt": '"a red fox"', "class": "class_labels=[0]", "nothing": "batch_size=1"}


def card_of(record: BundleRecord, name: str) -> str:
    """Return the card, in Markdown with the hub's header, of a bundle that will have this id."""
    programs = "\n".join(
        f"| {each.sampler.steps} | {each.budget:.1%} | {each.sampler.class_name} | {each.sampler.guidance_scale:g} |"
        for each in record.programs
    )
    size = sum(file.bytes for file in record.files.values())
    images = "random weights: images are meaningless; for speed and structure only\n\n" if record.random_weights else ""
    return f"""---
library_name: dipgo
tags: [dipgo, onnx, diffusion]
pipeline_tag: {_TASKS[record.conditioning.kind]}
---

# {name}

{images}A dipgo bundle: `{record.model.name}` ({record.model.class_name}), compiled into static ONNX graphs that compute
only what a search kept. {record.dtype}, {size / 1e6:.0f} MB. The licence of the weights is that of the model.

| steps | MACs of the full trajectory | sampler | guidance |
|---|---|---|---|
{programs}

```python
import dipgo

pipe = dipgo.load("{name}")
image = pipe({_ARGUMENTS[record.conditioning.kind]}).images[0]
```
"""
