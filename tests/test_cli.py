"""The command line: the whole path in a real process, and one line for everything that is wrong."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from pydantic import Field

from dipgo.cli import main as cli
from dipgo.cli.options import with_options
from dipgo.cli.recipe_file import Recipe, read_recipe
from dipgo.eager.gating import gated
from dipgo.schedule.subnet import load_subnet, save_subnet
from dipgo.searching.config import SearchConfig
from dipgo.searching.search import search
from tests import zoo
from tests.command import dipgo
from tests.models import random_subnet

SEARCH = ("search", "MODEL", "--steps", 5, "--budget", 0.5, "-o", "OUT")


@pytest.fixture(scope="module")
def task():
    return zoo.task("dit", 4)


@pytest.fixture(scope="module")
def subnet_file(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "subnet.json"
    save_subnet(random_subnet(task.trace, task.sampler, 0, terms=2, channels=2), path)
    return path


@pytest.fixture(scope="module")
def bundle(subnet_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "bundle"
    assert dipgo("export", subnet_file, "-o", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A Stable Diffusion pipeline with a SubNet, and its bundle, which takes prompts."""
    folder = tmp_path_factory.mktemp("cli")
    task = zoo.task("sd", 4)
    subnet = random_subnet(task.trace, task.sampler, 1, terms=2, channels=2)
    save_subnet(subnet, folder / "subnet.json")
    assert dipgo("export", folder / "subnet.json", "-o", folder / "bundle").code == 0
    return task.pipe, subnet, folder / "bundle"


def test_export_verify_run_inspect(bundle, tmp_path):
    code, out, _ = dipgo("verify", bundle)
    assert code == 0
    assert out.startswith("parity holds: relative error")
    code, out, _ = dipgo("run", bundle, "--class", "dog", "-n", 3, "-o", tmp_path / "x.png")
    assert code == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (32, 32)  # three pictures of 16x16, two by two
    code, out, _ = dipgo("inspect", bundle)
    assert code == 0
    assert "transformer_blocks.1.ff" in out
    assert "slots" in out


@pytest.mark.parametrize(("given", "written"), [("a_0.5", "a_0.5.png"), ("b.PNG", "b.PNG"), ("c.jpg", "c.jpg.png")])
def test_pictures_keep_the_name_that_they_are_given(bundle, tmp_path, given, written):
    code, out, err = dipgo("run", bundle, "--class", "dog", "-o", tmp_path / given)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == [written]
    assert written in out


@pytest.mark.slow
def test_merged_graphs_are_told_by_share(prompted, tmp_path):
    """The bundle has another size than the search had, so MACs in all are not to be compared."""
    subnet_file = prompted[-1].parent / "subnet.json"
    command = ["export", subnet_file, "--size", 32, "--max-graphs", 1, "--denoiser", "-o", tmp_path / "one"]
    code, out, err = dipgo(*command)
    assert code == 0, err
    told = re.fullmatch(r"graphs: 1, (.*)% of the MACs; the SubNet: (.*)%", out.splitlines()[0])
    assert told
    assert float(told[2]) < float(told[1]) <= 100


def test_search_starts_from_a_subnet(tiny_dit, subnet_file, tmp_path):
    command = ["search", tiny_dit, "--steps", 4, "--budget", 1, "--start", subnet_file]
    quick = [f"--set={setting}" for setting in ("drops=0", "contenders=1", "trial_iterations=0", "held_out=2")]
    command += [*quick, "--set=backup_iterations=0", "--set=drops_on=1", "--set=pool=0"]
    code, _, err = dipgo(*command, "-o", tmp_path / "s.json")
    assert code == 0, err
    assert "given 1" in load_subnet(tmp_path / "s.json").search.held_out_psnr_db


@pytest.mark.parametrize("negative", [None, "blue"])
def test_prompts_give_the_pictures_of_the_pipeline(prompted, tmp_path, negative):
    pipe, subnet, bundle = prompted
    code, out, _ = dipgo("verify", bundle)
    assert code == 0, out
    arguments = ["run", bundle, "--prompt", "a red fox", "-n", 2, "--seed", 3, "-o", tmp_path / "x.png"]
    code, out, _ = dipgo(*arguments, *(["--negative", negative] if negative else []))
    assert code == 0, out
    pipe.set_progress_bar_config(disable=True)
    with gated(pipe.unet, subnet):
        images = pipe(
            ["a red fox"] * 2,
            negative_prompt=[negative] * 2 if negative else None,
            guidance_scale=4.0,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
        ).images
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture).astype(int)
    expected = np.concatenate(list(images), axis=1) * 255  # side by side
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 1
    assert expected.std() > 1


def test_search_keeps_the_budget(tiny_dit, tmp_path):
    output = tmp_path / "s.json"
    arguments = ("search", tiny_dit, "--steps", 5, "--budget", 0.6, "--preset", "quick", "-o", output)
    code, out, _ = dipgo(*arguments)
    assert code == 0, out
    subnet = load_subnet(output)
    one_site = subnet.sites[0].macs / subnet.cost.full
    assert 0.6 - one_site <= subnet.cost.ratio <= 0.6
    assert subnet.search.psnr_db == max(subnet.search.held_out_psnr_db.values())


def test_an_option_that_is_added_to_a_config_is_everywhere(task, tmp_path, monkeypatch):
    """Written once: in help, in a recipe, in the record of a search, and checked in each."""

    class Wider(SearchConfig):
        sharpness: float = Field(0.5, ge=0, description="How sharp.")

    class WiderRecipe(Recipe):
        search: Wider | None = None

    def command(config: Wider) -> None:
        print(config.sharpness)

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(with_options(command))
    monkeypatch.setattr(cli, "application", lambda: app)
    code, out, _ = dipgo("--help")
    assert code == 0
    assert re.search(r"--sharpness FLOAT +How sharp. \[0<=x\] \[default: 0.5\]", out)
    options = ("--steps", 4, "--budget", 0.5, "--sharpness")
    assert dipgo(*options, 2)[:2] == (0, "2.0\n")
    code, _, err = dipgo(*options, -1)
    assert (code, err) == (2, "dipgo: --sharpness -1: should be greater than or equal to 0\n")

    file = tmp_path / "mine.yaml"
    file.write_text("schema: dipgo.recipe/1\nabout: mine\nmodel: m\noutput: o\nsearch: {steps: 4, budget: 0.5}\n")
    config = read_recipe(file, ["search.sharpness=3"], WiderRecipe).search
    assert config.sharpness == 3
    small = {"held_out": 2, "drops": 0, "drops_on": 1, "contenders": 1, "trial_iterations": 0, "backup_iterations": 0}
    assert search(task, config.changed(**small)).search.settings["sharpness"] == 3


def test_help_names_every_command():
    code, out, _ = dipgo("--help")
    assert code == 0
    for command in ("models", "search", "import", "export", "verify", "run", "bench", "inspect", "compile", "recipe"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "MODEL", "--steps", 5, "--budget", 0, "-o", "OUT"], 2, "budget 0 is outside (0, 1]"),
        (["search", "MODEL", "--steps", 5, "--budget", 1.5, "-o", "OUT"], 2, "budget 1.5 is outside (0, 1]"),
        (["search", "MODEL", "--steps", 5, "--budget", 0.1, "-o", "OUT"], 2, "what step 0 and the ungated parts"),
        (["search", "MODEL", "--steps", 1, "--budget", 0.5, "-o", "OUT"], 2, "--steps 1: should be greater"),
        ([*SEARCH, "--sites", "x.*"], 2, "matches no module"),
        ([*SEARCH, "--sampler", "y"], 2, "unknown sampler 'y'"),
        (
            [*SEARCH, "--preset", "z"],
            2,
            "--preset z: should be 'default' or",
        ),
        (
            [*SEARCH, "--method", "q"],
            2,
            "--method q: should be 'dipgo' or",
        ),
        (["search", "nowhere", "--steps", 5, "--budget", 0.5, "-o", "OUT"], 1, "no model 'nowhere'"),
        (["search", "MODEL", "--steps", 5, "--budget", 0.5, "-o", "SUBNET"], 2, "--force"),
        (
            ["search", "MODEL", "--steps", "five", "--budget", 0.5, "-o", "OUT"],
            2,
            "--steps five: should be a valid integer",
        ),
        ([*SEARCH, "--resume"], 2, "need --run-folder"),
        (
            [*SEARCH, "--set", "alfa=1"],
            2,
            "did you mean 'alpha'?",
        ),
        ([*SEARCH, "--classes", "wolf"], 2, "class 'wolf'"),
        ([*SEARCH, "--prompts", "p.txt"], 2, "by classes"),
        ([*SEARCH, "--device", "cuda:9"], 2, "device 'cuda:9'"),
        ([*SEARCH, "--set", "loss=mse"], 2, "loss term 'mse'"),
        ([*SEARCH, "--start", "x.json"], 1, "no such SubNet"),
        ([*SEARCH, "--start", "SUBNET"], 2, "give its --steps"),
        (["search", "MODEL"], 2, "Missing option"),
        (["export", "none.json", "-o", "OUT"], 1, "none.json: no such SubNet"),
        (["export", "SUBNET", "-o", "BUNDLE"], 2, "--force"),
        (["run", "BUNDLE", "--class", "wolf", "-o", "OUT"], 2, "class 'wolf' is unknown"),
        (["run", "nowhere", "--class", "1", "-o", "OUT"], 1, "no such bundle"),
        (["run", "BUNDLE", "--class", "1", "--threads", "100000", "-o", "OUT"], 2, "--threads"),
        (["run", "BUNDLE", "--class", "7" * 5000, "-o", "OUT"], 2, "is unknown to"),
        (["run", "BUNDLE", "--class", "1", "-o", ".."], 2, "-o ..: names no file; give one, such as out.png"),
        (["run", "n" * 300, "--class", "1", "-o", "OUT"], 1, "name too long"),
        (["export", "SUBNET", "--batch", "7" * 5000, "-o", "OUT"], 2, "give a number, min:max or min:opt:max"),
        ([*SEARCH, "--guidance", "nan"], 2, "--guidance nan"),
        (
            [*SEARCH, "--set", "tau=inf"],
            2,
            "--set tau=inf: should be a finite",
        ),
        (["deploy", "BUNDLE", "--triton", "OUT", "--wait", "inf"], 2, "--wait"),
        (["run", "BUNDLE", "-o", "OUT"], 2, "conditioned by class; give --class alone"),
        (["run", "BUNDLE", "--prompt", "a fox", "-o", "OUT"], 2, "conditioned by class; give --class alone"),
        (["run", "PROMPTED", "-o", "OUT"], 2, "conditioned by prompt; give --prompt alone"),
        (["run", "PROMPTED", "--prompt", "\udcff", "-o", "OUT"], 2, "the prompt is not valid Unicode ('\\udcff' at"),
        (["run", "PROMPTED", "--class", "1", "-o", "OUT"], 2, "conditioned by prompt; give --prompt alone"),
        (["run", "PROMPTED", "--class", "1", "--prompt", "a", "-o", "OUT"], 2, "give --prompt alone"),
        (["inspect", "none.json"], 1, "none.json: no such SubNet"),
        (["verify", "nowhere"], 1, "no such bundle"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_bad_input_is_one_line(arguments, code, message, tiny_dit, subnet_file, bundle, prompted, tmp_path):
    places = {"MODEL": tiny_dit, "OUT": tmp_path / "out.json", "SUBNET": subnet_file, "BUNDLE": bundle}
    places["PROMPTED"] = prompted[-1]
    got, _, err = dipgo(*(places.get(a, a) if isinstance(a, str) else a for a in arguments))
    lines = [line for line in err.splitlines() if line.startswith("dipgo: ")]
    assert got == code
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "folder", "known_by"),
    [
        (["export", "SUBNET", "-o", "OUT"], "out", "bundle.json"),
        (["compile", "MODEL", "--steps", 4, "--budget", 0.5, "-o", "OUT"], "out/bundle", "bundle.json"),
        (["compile", "MODEL", "--steps", 4, "--budget", 0.5, "-o", "OUT"], "out/report", "report.json"),
        (["bench", "BUNDLE", "-o", "OUT"], "out", "report.json"),
        (["bench", "--compare", "a", "b", "-o", "OUT"], "out", "comparison.html"),
        (["deploy", "BUNDLE", "--triton", "OUT", "--name", "x"], "out/x", "1/bundle/bundle.json"),
    ],
)
def test_force_replaces_what_dipgo_made_alone(
    arguments, folder, known_by, tiny_dit, subnet_file, bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr("dipgo.api.search_into", None)  # nothing is searched first
    mine = tmp_path / folder / "photo"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    places = {"MODEL": tiny_dit, "OUT": tmp_path / "out", "SUBNET": subnet_file, "BUNDLE": bundle}
    code, _, err = dipgo(*(places.get(argument, argument) for argument in arguments), "--force")
    assert code == 2
    assert f"{mine.parent}: holds no {known_by}, so --force does not replace it" in err
    known = mine.parent / known_by
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text("{}")
    code, _, err = dipgo(*(places.get(argument, argument) for argument in arguments), "--force")
    assert code == 2
    assert f"{mine.parent}: holds photo, which --force would delete" in err
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([mine, known])


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupt_leaves_nothing(tiny_dit, tmp_path, number):
    log = tmp_path / "log"
    output = tmp_path / "out" / "s.json"
    output.parent.mkdir()
    command = [sys.executable, "-m", "dipgo.cli.main", "search", tiny_dit, "--steps", "20", "--budget", "0.5"]
    with log.open("w") as stream:
        # A test run in the background inherits an ignored SIGINT; a user's terminal does not ignore it.
        process = subprocess.Popen(
            [*command, "--set", "drops=0", "--set", "held_out=4", "-o", str(output)],
            stderr=stream,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no other threads here
        )
    deadline = time.time() + 120
    while "trial" not in log.read_text() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == 1
    assert "dipgo: interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert list(output.parent.iterdir()) == []


def test_record_of_the_search_is_complete(tiny_dit, subnet_file):
    document = json.loads(subnet_file.read_text())
    assert document["model"]["name"] == tiny_dit
    assert document["sampler"]["class"] == "DDIMScheduler"
    assert len(document["gates"]) == document["sampler"]["steps"] == 4
    assert document["cost"]["kind"] == "macs"
