"""The emoji model's data, tokenizer, training and measures, on a package made here in the manner of the real one."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from dipgo.model.models import find_model
from dipgo.searching.run_folder import Cadence, open_run
from tests.checks import refused
from training import emoji as data
from training import emoji_quality, train_emoji_sd
from training.emoji_model import TRIAL, sample
from training.emoji_tokenizer import learn_tokenizer, save_tokenizer
from training.loop import Course, Draw, batch_of, train

COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey", "cyan", "gold"]
THINGS = ["HEART", "CAR", "HOUSE", "FISH"]


def entry(name, short, category="Objects", **changes):
    picture = {"image": f"{short}.png", "has_img_google": True}
    return {"name": name, "short_name": short, "short_names": [short], "category": category, **picture, **changes}


def write_package(path):
    """Forty emoji, a disc of one colour in one of four places each; one more is a skin tone."""
    entries, files = [entry("SKIN TONE", "tone", "Component")], {}
    for row, thing in enumerate(THINGS):
        for column, colour in enumerate(COLOURS):
            short = f"{colour}_{thing.lower()}"
            entries.append(entry(f"{colour.upper()} {thing}", short, "Flags" if row == 3 else "Objects"))
            picture, stream = Image.new("RGBA", (64, 64), (0, 0, 0, 0)), io.BytesIO()
            picture.paste((25 * column, 40 * row, 255 - 25 * column, 255), (16 * row, 16, 16 * row + 16, 48))
            picture.save(stream, "PNG")
            files[f"package/img/google/64/{short}.png"] = stream.getvalue()
    with tarfile.open(path, "w:gz") as package:
        for name, content in (files | {"package/emoji.json": json.dumps(entries).encode()}).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return write_package(tmp_path_factory.mktemp("package") / data.TARBALL)


def test_pictures_are_on_white_and_swatches_are_left_out(package):
    emoji, pictures = data.read_emoji(package)
    assert len(emoji) == 40
    assert pictures.shape == (40, 3, 64, 64)
    assert pictures.dtype == torch.uint8
    assert pictures[0, :, 0, 0].tolist() == [255, 255, 255]
    assert pictures[0, :, 20, 5].tolist() == [0, 0, 255]
    assert emoji[13].name == "white car"
    assert (emoji[0].mirrors, emoji[39].mirrors) == (True, False)  # an object, a flag


def test_names_are_natural_and_unique():
    names = {
        "heart": ("HEAVY BLACK HEART", "red heart"),
        "black_heart": ("BLACK HEART", "black heart"),
        "scissors": ("BLACK SCISSORS", "scissors"),
        "jp": ("Japan Flag", "flag: japan"),
        "man_in_tuxedo": ("MAN IN TUXEDO", "man in tuxedo"),
        "person_in_tuxedo": ("MAN IN TUXEDO", "person in tuxedo"),
        "mouse": ("MOUSE FACE", "mouse face"),
        "mouse2": ("MOUSE", "mouse"),
        "flashlight": ("ELECTRIC TORCH", "electric torch"),
        "mag": ("LEFT-POINTING MAGNIFYING GLASS", "left-pointing magnifying glass"),
    }
    flag = {"jp": {"category": "Flags", "short_names": ["jp", "flag-jp"]}}
    named = data.name_all([entry(name, short, **flag.get(short, {})) for short, (name, _) in names.items()])
    assert [one.name for one in named] == [natural for _, natural in names.values()]
    assert named[8].others == ("flashlight",)
    assert named[6].others == ()  # "mouse" is another's name
    assert [k for k, one in enumerate(named) if not one.mirrors] == [3, 9]


def test_held_out_share_no_picture():
    pictures = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1).repeat(1, 3, 64, 64)
    pictures[50:] = pictures[49]
    chosen = data.held_out(pictures)
    assert len(chosen) == 5
    assert set(chosen) <= set(range(49))
    assert chosen.tolist() == data.held_out(pictures).tolist()
    assert chosen.tolist() != data.held_out(pictures, seed=1).tolist()


def test_a_foreign_tarball_is_refused(package, tmp_path):
    with refused(rf"{data.TARBALL}: not the 16\.0\.0"):
        data.fetch(package.parent)
    (tmp_path / "x.tgz").write_bytes(b"no archive")
    with refused(r"x\.tgz: not a readable"):
        data.read_emoji(tmp_path / "x.tgz")


def test_captions_are_among_those_that_the_tokenizer_learns(package):
    emoji, _ = data.read_emoji(package)
    known, draw = set(data.captions(emoji)), np.random.default_rng(0)
    drawn = {data.caption(one, draw) for one in emoji for _ in range(20)}
    assert drawn <= known
    assert {one.name for one in emoji} <= drawn


def test_tokenizer_writes_any_text_and_comes_back(tmp_path):
    words = ["a red heart", "the red car", "a blue heart", "an emoji of a car"] * 3
    tokenizer = learn_tokenizer(words, 600)
    assert len(tokenizer) <= 600
    assert tokenizer.tokenize("red heart") == ["red</w>", "heart</w>"]
    save_tokenizer(tokenizer, tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("red heart", "Zürich: ☃ 100%", ""):
        ids = again(text, padding="max_length").input_ids
        assert ids == tokenizer(text, padding="max_length").input_ids
        assert len(ids) == 77
        written = again.decode(ids, skip_special_tokens=True)
        assert written.replace(" ", "") == text.lower().replace(" ", "")
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == again.get_vocab()
    assert vocabulary["<|endoftext|>"] == len(vocabulary) - 1
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert all(merge.replace(" ", "") in vocabulary for merge in merges)


def test_batches_sweep_epochs():
    seen = np.concatenate([batch_of(10, 4, iteration, seed=3) for iteration in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert sorted(np.bincount(batch_of(3, 7, 0, seed=0))) == [2, 2, 3]  # more than an epoch in one


def fit(folder, stop_at=None, rate=0.05):
    """Fit a line to noise; with ``stop_at`` the loss raises there, as a kill between two checkpoints would."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_at(iteration):
        if iteration == stop_at:
            raise KeyboardInterrupt
        x = Draw(0, iteration).noise(8, 3)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    run = open_run(folder, {"rate": rate}, resume=True, cadence=Cadence(iterations=1))
    return train(model, loss_at, Course("line", 60, 8, rate), run)


def test_a_training_goes_on_to_the_same_result(tmp_path):
    whole, figures = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=37)
    resumed, again = fit(tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    assert again["losses"] == figures["losses"]
    assert figures["losses"][-1] < 0.2 * figures["losses"][0]
    finished, _ = fit(tmp_path / "cut", stop_at=0)  # a finished one is not run again
    assert torch.equal(finished.weight, whole.weight)


def test_a_training_whose_module_has_two_names_for_one_tensor_goes_on(tmp_path):
    """T5 has them for its embedding."""

    def made():
        torch.manual_seed(0)
        model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
        model.second.weight = model.first.weight
        run = open_run(tmp_path / "run", {}, resume=True, cadence=Cadence(1))
        return train(
            model, lambda k: model.second(model.first(torch.ones(2))).square().sum(), Course("x", 4, 1, 0.1), run
        )

    average, _ = made()
    again, _ = made()
    assert again["first"].weight is again["second"].weight
    assert torch.equal(again["second"].weight, average["first"].weight)
    assert not torch.equal(again["second"].bias, again["first"].bias)


def test_what_ends_a_training(tmp_path):
    fit(tmp_path)
    with refused(r"was begun with rate = 0\.05, now it is 0\.01"):
        fit(tmp_path, rate=0.01)
    model = nn.Linear(1, 1)
    with refused("the loss is nan at iteration 1"):
        run = open_run(tmp_path / "run", {})
        train(model, lambda k: model.weight.sum() * float("nan"), Course("x", 5, 1, 0.1), run)


SCRIPT = """
import sys, pathlib
from training import emoji
from training import train_emoji_sd
emoji.SHA256 = sys.argv.pop()
train_emoji_sd.main()
"""


@pytest.fixture(scope="module")
def trained(package, tmp_path_factory):
    """The folder of a trial that was killed in the middle of the VAE and went on."""
    output = tmp_path_factory.mktemp("trial")
    arguments = ["-o", str(output), "--package", str(package.parent), "--trial", "--threads", "1"]
    command = [sys.executable, "-c", SCRIPT, *arguments, data.sha256_of(package)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint, deadline = output / "work" / "vae.safetensors", time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (output / "emoji-sd").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return output / "emoji-sd"


@pytest.mark.slow
def test_the_folder_is_a_pipeline_of_diffusers(trained):
    pipe = StableDiffusionPipeline.from_pretrained(trained)
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    stored = {value.dtype for part in trained.glob("*/*.safetensors") for value in load_file(part).values()}
    assert stored == {torch.float16}
    images = sample(pipe, ["red heart", "blue car"], steps=2, guidance=3.0)
    assert images.shape == (2, 3, 64, 64)
    alone = sample(pipe, ["blue car"], steps=2, guidance=3.0, seed=1)
    torch.testing.assert_close(alone[0], images[1], atol=1e-4, rtol=0)
    record = json.loads((trained / "training.json").read_text())
    assert set(record["stages"]) == {"vae", "unet"}
    names = json.loads((trained / "held-out.json").read_text())
    assert (len(names["held_out"]), len(names["training"])) == (2, 38)
    assert not set(names["held_out"]) & set(names["training"])


@pytest.mark.slow
def test_quality_tells_the_right_picture(trained, package):
    emoji, pictures = data.read_emoji(package)
    pipe = find_model(str(trained)).pipeline()
    latents = emoji_quality.encode(pipe.vae, data.to_unit(pictures)).flatten(1)
    again = emoji_quality.nearest(latents[[5, 3, 17]] + 1e-4, latents)
    assert (latents[again] == latents[[5, 3, 17]]).all()
    assert find_model(str(trained)).latent_shape(1) == (1, 4, 16, 16)
    quality = emoji_quality.measure(pipe, emoji, pictures, 10, [1.0, 3.0], steps=2)
    assert quality["count"] == 10
    assert quality["guidance_scale"] in (1.0, 3.0)
    assert quality["category_accuracy_by_chance"] == pytest.approx(0.25**2 + 0.75**2)
    assert 0 <= quality["exact_accuracy"] <= quality["category_accuracy"] <= 1


@pytest.mark.slow
def test_quality_writes_the_card(trained, package, monkeypatch):
    monkeypatch.setattr(data, "SHA256", data.sha256_of(package))
    arguments = [str(trained), "--package", str(package.parent), "--count", "4", "--steps", "2", "--guidance", "3"]
    monkeypatch.setattr(sys, "argv", ["emoji_quality", *arguments])
    emoji_quality.main()
    card = (trained / "README.md").read_text()
    figures = json.loads((trained / "quality.json").read_text())
    assert f"the very emoji for\n  {figures['exact_accuracy']:.1%}" in card
    assert "Apache License 2.0" in card
    assert "38 emoji of the npm package" in card
    with Image.open(trained / "held-out.png") as grid:
        assert grid.size == (8 * 88, 92)


def test_sizes_fit_the_repository():
    """All weights in half precision, with a vocabulary of 2,048 words, are below 39 MB."""
    for size in (train_emoji_sd.FULL, train_emoji_sd.SMALL):
        encoder = train_emoji_sd.new_text_encoder(
            size.text_width, size.text_layers, learn_tokenizer(["a"], TRIAL.words)
        )
        encoder.resize_token_embeddings(size.words)
        parts = [train_emoji_sd.new_vae(size), train_emoji_sd.new_unet(size), encoder]
        assert 2 * sum(value.numel() for part in parts for value in part.parameters()) < 39e6
