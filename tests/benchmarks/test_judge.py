"""``dipgo judge``: what it says of schedules against what bundles and the gated model say of the same ones."""

import json
import re
from importlib.resources import files

import numpy as np
import pytest

import dipgo as package
from benchmarks.bench.judge import Judge
from benchmarks.bench.judgement import Judged, Judgement, differences, json_schema
from benchmarks.bench.quality import image_psnr, psnr
from benchmarks.bench.subjects import IMAGE_SEED
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.subnet import save_subnet
from tests import zoo
from tests.checks import misused, refused
from tests.command import dipgo
from tests.models import random_subnet

STEPS, IMAGES = 4, 9


@pytest.fixture(scope="module")
def subnets(tmp_path_factory):
    """The files of three schedules: everything, half of it, and half by other sites."""
    folder = tmp_path_factory.mktemp("subnets")
    task, blocks = zoo.task("dit", STEPS), zoo.task("dit", STEPS, sites="block")
    made = {
        "whole": task.subnet(Schedule(np.ones((STEPS, len(task.trace.sites)), bool))),
        "half": random_subnet(task.trace, task.sampler, seed=3, keep=0.5, terms=2, channels=2),
        "blocks": random_subnet(blocks.trace, blocks.sampler, seed=4, keep=0.5),
    }
    for name, subnet in made.items():
        save_subnet(subnet, folder / f"{name}.json")
    return {name: folder / f"{name}.json" for name in made}, made


@pytest.fixture(scope="module")
def judgement(subnets):
    return package.judge(list(subnets[0].values()), images=IMAGES, threads=1)


def test_each_schedule_is_held_against_the_full_trajectory(subnets, judgement):
    """By the search's own trajectory, each image alone; what computes everything is the full trajectory."""
    paths, made = subnets
    rows = {row.name: row for row in judgement.rows}
    assert rows[str(paths["whole"])].quality.image_psnr_db == 150
    task = zoo.task("dit", STEPS, sites="block")
    batch = task.sampling.draw(IMAGES, IMAGE_SEED)
    alone = Judge(task, [batch])
    images, full = alone.gated(made["blocks"]).images, alone.full(task).images
    row = rows[str(paths["blocks"])]
    assert row.quality.psnr_db == pytest.approx(psnr(images, full), abs=0.01)
    assert np.allclose(row.quality.each_psnr_db, image_psnr(images, full), atol=0.01)
    assert row.macs_ratio == made["blocks"].cost.ratio
    counts = {max(2, round(STEPS * subnet.cost.ratio)) for subnet in made.values()}
    assert {name for name in rows if "plain" in name} == {f"{count} plain steps" for count in counts}
    assert rows[f"{STEPS} plain steps"].quality.image_psnr_db == 150


def test_differences_are_of_the_same_images(judgement):
    """A lead of 1 dB on each image is beyond chance, however far apart the images are; noise about nothing is not."""
    generator = np.random.default_rng(0)
    theirs, quality = generator.normal(30, 10, 64), judgement.rows[0].quality
    each = {"a": theirs, "b": theirs + generator.normal(1, 0.1, 64), "c": theirs + generator.normal(0, 3, 64)}

    def row(name):
        figures = {"each_psnr_db": each[name].tolist(), "each_ssim": []}
        return Judged(name=name, steps=4, macs_ratio=0.5, quality=quality.model_copy(update=figures))

    ahead, alike = differences([row(name) for name in each], [("a", "b"), ("a", "c")])
    assert ahead.beyond_chance
    assert re.fullmatch(r"b is closer than a by 1\.0\d dB \(\+0\.9\d to \+1\.0\d\)", ahead.line())
    assert not alike.beyond_chance
    assert "no difference beyond chance" in alike.line()


def test_the_command_prints_a_table_and_writes_all_figures(subnets, judgement, tmp_path):
    paths, _ = subnets
    done = dipgo("judge", *paths.values(), "-n", IMAGES, "--threads", 1, "--json", tmp_path / "j.json")
    assert done.code == 0, done.err
    record = Judgement.model_validate_json((tmp_path / "j.json").read_text())
    assert record.rows == judgement.rows
    assert record.differences == judgement.differences
    head, first, *_ = done.out.splitlines()
    assert re.split(r"  +", head)[:5] == ["schedule", "MACs", "PSNR", "95% interval", "worst image"]
    assert first.split()[:3] in ([str(paths["whole"]), "100.0%", "identical"], ["4", "plain", "steps"])
    for difference in judgement.differences:
        assert difference.line() in done.out
    schema = files("benchmarks").joinpath("schemas/judgement-1.json").read_text()
    assert json.loads(schema) == json.loads(json_schema()), "run: python -m benchmarks.bench.judgement > that file"
    again = dipgo("judge", paths["half"], "--json", tmp_path / "j.json")
    assert (again.code, len(again.err.splitlines())) == (2, 1)
    assert "--force" in again.err


def test_what_cannot_be_judged_together_is_refused(subnets, tmp_path):
    paths, _ = subnets
    longer = zoo.task("dit", 6)
    other = random_subnet(longer.trace, longer.sampler, seed=3)
    with misused(r"SubNet 2 is for 6 steps of DDIMScheduler .*, the first for 4 steps"):
        package.judge([paths["half"], other], images=8)
    with misused("images = 7: should be greater"):
        package.judge([paths["half"]], images=7)
    with misused("each once"):
        package.judge([paths["half"], paths["half"]])
    with refused("belongs to"):
        package.judge([paths["half"]], model=zoo.pipeline("sd"))
    with misused("by classes"):
        package.judge([paths["half"]], prompts=tmp_path / "p.txt")
    with refused("no such SubNet"):
        package.judge([tmp_path / "none.json"])
