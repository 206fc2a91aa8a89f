"""Search, compile, run: the built-in digits at 35 % of their compute. Two minutes or so; a real search takes longer.

python examples/quickstart.py [FOLDER]
"""

import sys
from pathlib import Path

import dipgo

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/quickstart")
short = {"preset": "quick", "pool": 16, "held_out": 8, "trial_iterations": 1, "backup_iterations": 2}
subnet = dipgo.search("digits-dit", steps=20, budget=0.35, **short)
dipgo.export(subnet, folder / "bundle", force=True)

with dipgo.load(folder / "bundle") as pipe:  # called like the diffusers pipeline that it came from
    images = pipe(class_labels=[3, 1, 4, 1, 5], generator=0).images
for number, image in enumerate(images):
    image.save(folder / f"{number}.png")
print(f"{len(images)} images in {folder}, {subnet.cost.ratio:.1%} of the MACs")
