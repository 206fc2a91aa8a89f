"""The small FLUX.1-dev's captions, tokenizers, noise levels and training, on some of the digits."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file
from transformers import T5Tokenizer

from benchmarks.bench.digit_classifier import digit_of
from training import digit_captions, flux_quality, pictures, train_flux
from training.flux_model import SCHEDULER, draw_sigmas, sample
from training.t5_tokenizer import learn_t5_tokenizer


def test_every_caption_names_its_digit():
    captions = digit_captions.captions()
    assert len(set(captions)) == 360
    assert [digit_of(text) for text in captions] == [digit for digit in range(10) for _ in range(36)]
    assert set(digit_captions.prompts()) < set(captions)
    assert [digit_of(text) for text in ("", "a two or a 3", "7 or seven", "One, thin")] == [None, None, None, 1]


def test_looks_are_what_is_to_be_seen():
    """Bars of one label: thin and bold ones, upright and leaning to the right."""
    bars = torch.full((6, 1, 16, 16), -1.0)
    for number, (width, lean) in enumerate([(1, 0), (2, 1), (3, 2), (1, 2), (2, 0), (3, 1)]):
        for row in range(16):
            start = 6 + round(lean * (8 - row) / 4)
            bars[number, 0, row, start : start + width] = 1
    looks = digit_captions.looks(bars, torch.zeros(6))
    assert [weight for weight, _ in looks] == ["thin", "", "bold", "thin", "", "bold"]
    assert [slant for _, slant in looks] == ["upright", "", "slanted", "slanted", "upright", ""]
    drawn = {digit_captions.caption(8, looks[2], np.random.default_rng(seed)) for seed in range(200)}
    assert drawn <= set(digit_captions.captions())
    assert len(drawn) == 16
    assert not any("thin" in text or "upright" in text for text in drawn)


def test_t5_reads_what_it_learned(tmp_path):
    texts = digit_captions.captions()
    tokenizer = learn_t5_tokenizer(texts, 600, 16)
    tokenizer.save_pretrained(tmp_path)
    again = T5Tokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 16
    ids = again(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert ids.shape == (360, 16)
    assert len(ids.unique(dim=0)) == 360
    assert again.batch_decode(ids, skip_special_tokens=True) == texts
    assert not (ids == again.unk_token_id).any()


def test_noise_levels_are_shifted_as_the_scheduler_does():
    """The middle of what is drawn is where the scheduler puts the middle of its levels."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(sigmas=[0.5], mu=calculate_shift(16))
    drawn = draw_sigmas(20_001, 16, torch.Generator().manual_seed(0))
    assert drawn.median() == pytest.approx(float(scheduler.sigmas[0]), abs=0.01)
    assert 0 < drawn.min() < 0.05
    assert 0.95 < drawn.max() < 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a trial on forty digits."""
    output = tmp_path_factory.mktemp("trial")
    whole = pictures.digits()
    some = replace(whole, images=whole.images[:40], unseen=whole.unseen[:10])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_flux, "digits", lambda: some)
        patch.setattr(sys, "argv", ["train_flux", "-o", str(output), "--trial"])
        train_flux.main()
    return output / "digits-flux"


@pytest.mark.slow
def test_the_folder_is_a_pipeline_of_diffusers(trained):
    pipe = FluxPipeline.from_pretrained(trained)
    assert pipe.text_encoder.dtype == pipe.text_encoder_2.dtype == pipe.transformer.dtype == torch.float32
    stored = {value.dtype for part in trained.glob("*/*.safetensors") for value in load_file(part).values()}
    assert stored == {torch.float16}
    prompts = ["three", "the bold digit 7"]
    images = sample(pipe, prompts, steps=2)
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(sample(pipe, prompts[1:], steps=2, seed=1)[0], images[1], atol=1e-4, rtol=0)
    assert set(json.loads((trained / "training.json").read_text())["stages"]) == {"vae", "flow", "guidance"}


@pytest.mark.slow
def test_quality_writes_the_card(trained, monkeypatch):
    monkeypatch.setattr(flux_quality, "PAIRS", 1)
    monkeypatch.setattr(flux_quality, "STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["flux_quality", str(trained), "--count", "10"])
    flux_quality.main()
    figures = json.loads((trained / "quality.json").read_text())
    assert figures["pairs"] == 10
    assert f"{figures['class_accuracy']:.1%} of 10 images" in (trained / "README.md").read_text()
