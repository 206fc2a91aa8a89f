"""A bundle inside a diffusers pipeline: its own scheduler, callbacks and VAE run on, only the denoiser is replaced.

python examples/drop_in.py [FOLDER]
"""

import sys
from pathlib import Path

import torch

import dipgo
from dipgo.schedule.fixed_schedules import Rule, spaced
from dipgo.searching.task import make_task

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/drop_in")
model = dipgo.find_model("digits-dit")
task = make_task(model, steps=20)
rule = Rule()  # for want of a search
subnet = task.subnet(spaced(task.trace.macs, task.sampler.calls, 0.5, rule), method=rule.name)
dipgo.export(subnet, folder / "bundle", force=True)

pipe = task.pipe  # any DiffusionPipeline.from_pretrained(…) of the model
request = {"class_labels": [7], "num_inference_steps": 20, "guidance_scale": 4.0}
full = pipe(**request, generator=torch.Generator().manual_seed(0), output_type="np").images
with dipgo.attach(pipe, folder / "bundle"):
    fast = pipe(**request, generator=torch.Generator().manual_seed(0), output_type="np").images
psnr = -10 * torch.tensor((full - fast) ** 2).mean().log10().item()
print(f"{subnet.cost.ratio:.1%} of the MACs, {psnr:.1f} dB to the full pipeline's image")
