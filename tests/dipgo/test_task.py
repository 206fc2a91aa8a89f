"""What the search draws: prompts, classes, pools, and settings by name."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dipgo.eager.sampling import Sampling
from dipgo.model.families import FAMILIES
from dipgo.model.models import find_model
from dipgo.model.prompts import read_prompts
from dipgo.searching.distributed import Processes
from dipgo.searching.pool import Pool
from dipgo.searching.task import Choices, choices_of
from tests import zoo
from tests.checks import misused, refused

STEPS = 3


def family(kind):
    return next(family for family in FAMILIES if family.conditioned_by == kind)


def test_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red fox\n\n  ein grüner Frosch \r\n狐\n".encode())
    assert read_prompts(path) == ["a red fox", "ein grüner Frosch", "狐"]
    assert choices_of(family("prompt"), {}, path, None) == read_prompts(path)
    assert choices_of(family("prompt"), {}, path, None, ["own"]) == read_prompts(path)
    assert choices_of(family("prompt"), {}, None, None, ["own"]) == ["own"]
    assert choices_of(family("prompt"), {}, None, None) == [""]


def test_a_models_folder_brings_prompts(tmp_path):
    emoji = find_model("emoji-sd").prompts()
    assert len(emoji) > 1000
    assert "red heart" in emoji
    folder = tmp_path / "without"
    shutil.copytree(find_model("emoji-sd").folder, folder, ignore=shutil.ignore_patterns("prompts.txt"))
    assert find_model(str(folder)).prompts() == []
    assert find_model("digits-dit").prompts() == []


def test_prompt_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "prompts.txt"
    with refused(f"{path}.*no such prompt file"):
        read_prompts(path)
    for content, message in (
        (b"", "no prompt in it"),
        (b" \n\n\t\n", "no prompt in it"),
        (b"fine\n\xff\xfe\n", "not UTF-8 at byte 5"),
    ):
        path.write_bytes(content)
        with refused(f"{path}.*{message}"):
            read_prompts(path)
    with refused("not a readable prompt file"):
        read_prompts(tmp_path)


def test_classes(task, tmp_path):
    kind, labels = task.model.family, task.model.labels()
    assert choices_of(kind, labels, None, None) == choices_of(kind, labels, None, "all") == [0, 1, 2]
    assert choices_of(kind, labels, None, "fox, 0") == [0, 2]
    for wrong in ("wolf", "0,7", ""):
        with misused("give names or numbers such as cat, dog, fox"):
            choices_of(kind, labels, None, wrong)
    with misused("conditioned by classes"):
        choices_of(kind, labels, tmp_path / "p.txt", None)
    with misused("conditioned by prompts"):
        choices_of(family("prompt"), {}, None, "cat")
    only = zoo.task("dit", STEPS, choices=Choices(classes="dog"))
    assert set(only.sampling.draw(8, 0).conditions["class_labels"].tolist()) == {1000, 1}


def test_each_prompt_is_encoded_once(task):
    seen = []

    def conditions(pipe, prompts):
        seen.extend(prompts)
        return {"e": torch.zeros(1, 2)}, {"e": torch.full((1, 2), float(len(prompts[0])))}

    guided = SimpleNamespace(denoiser=task.pipe.transformer, guided=True, guidance_scale=4.0)
    sampling = Sampling(None, guided, SimpleNamespace(conditions=conditions), (1, 4, 8, 8), ["a", "bb", "ccc"])
    for seed in range(5):
        batch = sampling.draw(6, seed)
        assert batch.conditions["e"].shape == (12, 2)
        assert (batch.conditions["e"][:6] == 0).all()
        assert (batch.conditions["e"][6:] > 0).all()
    assert sorted(seen) == ["a", "bb", "ccc"]


def rows(pool, numbers):
    return [pool[number][0].noise for number in numbers]


def test_a_pool_covers_itself_in_every_epoch_and_is_random_access(task):
    pool = Pool(task, 12, 2, seed=5, chunk=4)
    assert pool.rows == 6
    epochs = [torch.cat(rows(pool, range(start, start + 6))) for start in (0, 6, 12)]
    as_sets = [{tuple(image.flatten()[:4].tolist()) for image in epoch} for epoch in epochs]
    assert len(as_sets[0]) == 12
    assert as_sets[0] == as_sets[1] == as_sets[2]
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    again = Pool(task, 12, 2, seed=5, chunk=4)
    for number in (17, 3, 8):
        (batch, target), (other, other_target) = pool[number], again[number]
        assert torch.equal(batch.noise, other.noise)
        assert torch.equal(batch.conditions["class_labels"], other.conditions["class_labels"])
        assert torch.equal(target[-1], other_target[-1])
        full = task.trajectory.full(batch.noise, batch.conditions)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(full, target, strict=True))


@pytest.mark.parametrize("size", [0, 12])
def test_shares_of_a_pool_make_the_joint_batch(task, size):
    whole = Pool(task, size, 6, seed=1)
    parts = [Pool(task, size, 2, 1, Processes(rank, 3)) for rank in range(3)]
    for number in (0, 1, 7):
        batch, target = whole[number]
        pieces = [part[number] for part in parts]
        assert torch.equal(batch.noise, torch.cat([piece.noise for piece, _ in pieces]))
        assert torch.allclose(target[-1], torch.cat([latents[-1] for _, latents in pieces]), atol=1e-5)
        halves = [piece.conditions["class_labels"].split(2) for piece, _ in pieces]
        expected = torch.cat([half[k] for k in (0, 1) for half in halves])
        assert torch.equal(batch.conditions["class_labels"], expected)


def test_fresh_noise_never_repeats(task):
    pool = Pool(task, 0, 2, seed=1, chunk=4)
    drawn = torch.cat(rows(pool, range(10))).flatten(1)
    assert len(np.unique(drawn.numpy(), axis=0)) == 20
    assert len(pool._chunks) == 1


def test_a_device_that_is_not_there():
    for name in ("cuda:9", "quantum"):
        with misused(f"device '{name}' cannot be used here"):
            zoo.task("dit", STEPS, device=name)
