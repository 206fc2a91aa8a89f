"""A denoiser that nobody registered: sites by pattern, on a small unconditional UNet with random weights.

python examples/custom_model.py [FOLDER]
"""

import sys
from pathlib import Path

from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import dipgo
from dipgo.schedule.fixed_schedules import Rule, spaced
from dipgo.searching.task import make_task

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/custom_model")
unet = UNet2DModel(
    sample_size=16,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)
DDIMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder / "model")

model = dipgo.find_model(str(folder / "model"))
task = make_task(model, steps=10, sites="down_blocks.*,mid_block,up_blocks.*")
rule = Rule()
subnet = task.subnet(spaced(task.trace.macs, task.sampler.calls, 0.5, rule), method=rule.name)
dipgo.export(subnet, folder / "bundle", force=True)
with dipgo.load(folder / "bundle") as pipe:
    pipe(batch_size=1, generator=0).images[0].save(folder / "image.png")
print(f"{len(subnet.sites)} sites, {subnet.cost.ratio:.1%} of the MACs: {folder / 'image.png'}")
