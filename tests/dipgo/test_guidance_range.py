"""A search for a range of guidance scales: each image has a scale of its own, and the SubNet says the range."""

import torch

from dipgo.base.guidance import SCALE, GuidanceScale, guidance_of
from dipgo.searching.task import make_task
from tests import zoo
from tests.checks import misused


def test_images_are_drawn_at_scales_of_their_own():
    task = make_task(zoo.model("dit"), 4, "ddim", None, guidance_of("3:7", 0.0))
    batch = task.sampling.draw(16, 0)
    scales = batch.conditions[SCALE].flatten()
    assert torch.equal(scales[:16], scales[16:])
    assert 3 <= scales.min() < 4
    assert 6 < scales.max() <= 7
    final = task.trajectory.full(batch.noise, batch.conditions)[-1]
    for image in (0, 9):
        alone = make_task(zoo.model("dit"), 4, "ddim", task.trace, float(scales[image]))
        own = {name: value[[image, 16 + image]] for name, value in batch.conditions.items() if name != SCALE}
        made = alone.trajectory.full(batch.noise[[image]], own)[-1]
        assert torch.allclose(made, final[[image]], rtol=1e-4, atol=1e-4)
    identity = task.identity
    assert (identity.guidance_scale, identity.guidance_spread) == (5.0, 2.0)
    assert identity.guidance.spread == 2.0


def test_embedded_guidance_is_drawn_too():
    task = make_task(zoo.model("flux"), 4, None, None, GuidanceScale(4.0, spread=1.0))
    scales = task.sampling.draw(8, 0).conditions["guidance"]
    assert 3 <= scales.min() < scales.max() <= 5


def test_bad_ranges_are_refused():
    for text in ("5:", "a", "9:5", "1:2:3", "nan", "1:inf"):
        with misused(f"--guidance {text}: give a finite number, or a range"):
            guidance_of(text, 0.0)
    with misused("--guidance 1:5: the pipeline makes no guidance at 1; give a range above it"):
        make_task(zoo.model("dit"), 4, "ddim", None, guidance_of("1:5", 0.0))
    with misused("--guidance 0.5:0.9: the pipeline makes no guidance at 0.5"):
        make_task(zoo.model("dit"), 4, "ddim", None, guidance_of("0.5:0.9", 0.0))
