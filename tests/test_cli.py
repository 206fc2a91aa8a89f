"""The command line: the whole path in a real process, and one line for everything that is wrong."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
import tomllib

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from pydantic import Field

from dipgo import __version__ as version
from dipgo.base.install import missing
from dipgo.cli import main as cli
from dipgo.cli.options import with_options
from dipgo.cli.recipe_file import Recipe, read_recipe
from dipgo.eager.gating import gated
from dipgo.schedule.subnet import load_subnet, save_subnet
from dipgo.searching.config import SearchConfig
from dipgo.searching.search import search
from tests import zoo
from tests.checks import ROOT
from tests.command import dipgo, sets
from tests.models import random_subnet

SEARCH = ("search", "MODEL", "--steps", 5, "--budget", 0.5, "-o", "OUT")


STEPS = 4


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
    task = zoo.task("sd", STEPS)
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


@pytest.mark.parametrize(
    ("given", "written", "kind"),
    [
        ("a_0.5", "a_0.5.png", "PNG"),
        ("b.PNG", "b.PNG", "PNG"),
        ("c.jpg", "c.jpg", "JPEG"),
        ("d.webp", "d.webp", "WEBP"),
        ("e.txt", "e.txt.png", "PNG"),
    ],
)
def test_pictures_keep_the_name_that_they_are_given_and_are_what_it_says(bundle, tmp_path, given, written, kind):
    code, out, err = dipgo("run", bundle, "--class", "dog", "-o", tmp_path / given)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == [written]
    assert written in out
    with Image.open(tmp_path / written) as picture:
        assert picture.format == kind


def test_pictures_without_a_name_are_numbered_and_replace_nothing(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for written in ("images.png", "images-2.png", "images-3.png"):
        assert dipgo("run", bundle, "--class", "dog")[:2] == (0, f"1 image: {written}\n")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_bundle_is_found_in_the_folder_that_compile_made(bundle, subnet_file, tmp_path):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "bundle").symlink_to(bundle)
    code, out, err = dipgo("run", tmp_path / "build", "--class", "dog", "-o", tmp_path / "x.png")
    assert (code, out) == (0, f"1 image: {tmp_path / 'x.png'}\n"), err
    assert dipgo("inspect", tmp_path / "build").out == dipgo("inspect", bundle).out
    (tmp_path / "build" / "again").symlink_to(bundle)
    code, _, err = dipgo("verify", tmp_path / "build")
    assert (code, err) == (2, f"dipgo: {tmp_path / 'build'}: holds several bundles (again, bundle); give one of them\n")


WRONG_KINDS = [
    (["run", "SUBNET", "--class", 1], "a SubNet, not a bundle; make a bundle of it: dipgo export"),
    (["verify", "PIPELINE"], "a diffusers pipeline, not a bundle; make a bundle of it: dipgo compile"),
    (["bench", "REPORT", "-o", "OUT"], "a report, not a bundle; give a bundle"),
    (["serve", "RECORD"], "a bundle's record, not a bundle; give the folder that it lies in"),
    (["export", "BUNDLE", "-o", "OUT"], "a bundle, not a SubNet; its SubNet is BUNDLE/subnet.json"),
    (["judge", "PIPELINE"], "a diffusers pipeline, not a SubNet; search one: dipgo search"),
    (
        ["search", "BUNDLE", "--steps", 4, "--budget", 0.5, "-o", "OUT"],
        "a bundle, not a diffusers pipeline; its images",
    ),
    (["compile", "SUBNET", "--steps", 4, "--budget", 0.5, "-o", "OUT"], "a SubNet, not a diffusers pipeline; compile"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_KINDS)
def test_what_is_given_in_the_place_of_something_else_is_named(
    arguments, message, tiny_dit, subnet_file, bundle, tmp_path
):
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.json").write_text("{}")
    places = {"PIPELINE": tiny_dit, "SUBNET": subnet_file, "BUNDLE": bundle, "REPORT": report}
    places |= {"RECORD": bundle / "bundle.json", "OUT": tmp_path / "out"}
    code, _, err = dipgo(*(places.get(argument, argument) for argument in arguments))
    assert code == 1
    assert message.replace("BUNDLE", str(bundle)) in err


def test_dipgo_alone_shows_its_commands_in_groups():
    code, out, err = dipgo()
    assert (code, err) == (0, "")
    assert out == dipgo("--help").out == dipgo("-h").out
    for title in ("First steps:", "Find a schedule:", "Compile and run:", "Prove:", "Serve:", "All at once:"):
        assert f"\n{title}\n" in out
    assert "..." not in out.replace("[ARGS]...", "")
    assert max(map(len, out.splitlines())) <= 80
    assert len(re.findall(r"^  \S+ {2,}\S", out[out.index("First steps") :], re.MULTILINE)) == 20
    code, out, _ = dipgo("recipe")
    assert code == 0
    assert "validate" in out
    assert dipgo("--version").out == f"dipgo {version}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serch"], "No such command 'serch'. Did you mean 'search', 'serve', 'bench'? See 'dipgo --help'"),
        (["run"], "Missing argument 'BUNDLE'; see 'dipgo run --help'"),
        (["recipe", "run"], "Missing argument 'FILE'; see 'dipgo recipe run --help'"),
        (
            ["search", "digits-dit", "--steps", 1, "--budget", 0.5, "-o", "x"],
            "or equal to 2; see 'dipgo search --help'",
        ),
        (["bench"], "give a BUNDLE and -o REPORT, or --compare A B; see"),
    ],
)
def test_errors_point_to_the_help_of_their_command(arguments, message):
    code, _, err = dipgo(*arguments)
    assert code == 2
    assert message in err


def test_settings_are_shown_with_their_meaning():
    for command in ("search", "compile"):
        code, out, _ = dipgo(command, "--show-settings")
        assert code == 0
        for name in SearchConfig.SETTINGS:
            assert re.search(rf"^  {name} = .+\n      \w", out, re.MULTILINE), name
        assert re.search(r"^  batch = 8 .*; 4 with --preset gpu; 1 with --method paper$", out, re.MULTILINE)


def test_verify_ends_in_a_verdict(bundle, monkeypatch):
    code, out, _ = dipgo("verify", bundle)
    assert code == 0
    assert re.fullmatch(rf"PASSED in \d+ s: dipgo verify {bundle}", out.splitlines()[-1])
    monkeypatch.setattr("benchmarks.bench.parity.TOLERANCE", 1e-12)
    code, out, err = dipgo("verify", bundle)
    assert code == 1
    assert re.fullmatch(rf"FAILED in \d+ s: dipgo verify {bundle}", out.splitlines()[-1])
    assert "parity does not hold" in err


def test_phases_are_lines_where_there_is_no_terminal(bundle):
    lines = dipgo("verify", bundle).err.splitlines()
    assert [re.fullmatch(r" *\d+:\d\d  (.*)", line)[1] for line in lines] == ["verify: torch", "verify: compiled"]


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requires = [f"{line}; extra == '{extra}'" for extra, lines in extras.items() for line in lines]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: requires)
    error = ModuleNotFoundError("No module named 'diffusers.x'", name="diffusers.x")
    assert missing(error) == "diffusers is not installed; run: pip install 'dipgo[search]'"
    assert missing(ModuleNotFoundError("No module named 'nothing'", name="nothing")) is None


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


def test_prompts_give_the_pictures_of_the_pipeline(prompted, tmp_path):
    pipe, subnet, bundle = prompted
    code, out, _ = dipgo("verify", bundle)
    assert code == 0, out
    arguments = ["run", bundle, "--prompt", "a red fox", "-n", 2, "--seed", 3, "-o", tmp_path / "x.png"]
    code, out, _ = dipgo(*arguments, "--negative", "blue")
    assert code == 0, out
    given = {"negative_prompt": ["blue"] * 2, "guidance_scale": 4.0, "output_type": "np"}
    with gated(pipe.unet, subnet):
        generator = torch.Generator().manual_seed(3)
        images = pipe(["a red fox"] * 2, num_inference_steps=STEPS, generator=generator, **given).images
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture).astype(int)
    expected = np.concatenate(list(images), axis=1) * 255  # side by side
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 1
    assert expected.std() > 1


def test_search_keeps_the_budget_and_starts_from_a_subnet(tiny_dit, subnet_file, tmp_path):
    output = tmp_path / "s.json"
    arguments = ("search", tiny_dit, "--steps", STEPS, "--budget", 0.6, "--preset", "quick", "--start", subnet_file)
    code, out, _ = dipgo(*arguments, *sets(zoo.LEAST), "-o", output)
    assert code == 0, out
    subnet, document = load_subnet(output), json.loads(output.read_text())
    assert (document["model"]["name"], document["sampler"]["class"]) == (tiny_dit, "DDIMScheduler")
    assert len(document["gates"]) == document["sampler"]["steps"] == STEPS
    assert document["cost"]["kind"] == "macs"
    one_site = subnet.sites[0].macs / subnet.cost.full
    assert 0.6 - one_site <= subnet.cost.ratio <= 0.6
    judged = subnet.search.held_out_psnr_db
    assert subnet.search.psnr_db == max(judged.values())
    assert any(name.startswith("given 1") for name in judged)


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
    assert (code, err) == (2, "dipgo: --sharpness -1: should be greater than or equal to 0; see 'dipgo --help'\n")

    file = tmp_path / "mine.yaml"
    file.write_text("schema: dipgo.recipe/1\nabout: mine\nmodel: m\noutput: o\nsearch: {steps: 4, budget: 0.5}\n")
    config = read_recipe(file, ["search.sharpness=3"], WiderRecipe).search
    assert config.sharpness == 3
    small = {"drops": 0, "contenders": 1, "trial_iterations": 0, "backup_iterations": 0}
    assert search(task, config.changed(**zoo.LEAST | small)).search.settings["sharpness"] == 3


SEARCHING = ["search", "MODEL", "--steps", 5, "-o", "OUT", "--budget"]
BY_CLASS, BY_PROMPT = ("conditioned by class; give --class alone", "conditioned by prompt; give --prompt alone")
BAD_INPUT = [
    ([*SEARCHING, 0], 2, "budget 0 is outside (0, 1]"),
    ([*SEARCHING, 0.1], 2, "what step 0 and the ungated parts"),
    ([*SEARCH, "--steps", 1], 2, "--steps 1: should be greater"),
    ([*SEARCH, "--steps", "five"], 2, "--steps five: should be a valid integer"),
    ([*SEARCH, "--sites", "x.*"], 2, "matches no module"),
    ([*SEARCH, "--sampler", "y"], 2, "unknown sampler 'y'"),
    ([*SEARCH, "--method", "q"], 2, "--method q: should be 'dipgo' or"),
    (["search", "nowhere", *SEARCH[2:]], 1, "no model 'nowhere'"),
    ([*SEARCH, "-o", "SUBNET"], 2, "--force"),
    ([*SEARCH, "--resume"], 2, "need --run-folder"),
    ([*SEARCH, "--set", "alfa=1"], 2, "did you mean 'alpha'?"),
    ([*SEARCH, "--classes", "wolf"], 2, "class 'wolf'"),
    ([*SEARCH, "--prompts", "p.txt"], 2, "by classes"),
    ([*SEARCH, "--device", "cuda:9"], 2, "device 'cuda:9'"),
    ([*SEARCH, "--start", "x.json"], 1, "no such SubNet"),
    ([*SEARCH, "--start", "SUBNET"], 2, "give its --steps"),
    ([*SEARCH, "--guidance", "nan"], 2, "--guidance nan"),
    ([*SEARCH, "--set", "tau=inf"], 2, "--set tau=inf: should be a finite"),
    (["search", "MODEL"], 2, "Missing option"),
    (["export", "none.json", "-o", "OUT"], 1, "none.json: no such SubNet"),
    (["export", "SUBNET", "-o", "BUNDLE"], 2, "--force"),
    (["export", "SUBNET", "--batch", "7" * 5000, "-o", "OUT"], 2, "give a number, min:max or min:opt:max"),
    (["run", "BUNDLE", "--class", "wolf", "-o", "OUT"], 2, "class 'wolf' is unknown"),
    (["run", "nowhere", "--class", "1", "-o", "OUT"], 1, "no such bundle"),
    (["run", "n" * 300, "--class", "1", "-o", "OUT"], 1, "name too long"),
    (["run", "BUNDLE", "--class", "1", "--threads", "100000", "-o", "OUT"], 2, "--threads"),
    (["run", "BUNDLE", "--class", "7" * 5000, "-o", "OUT"], 2, "is unknown to"),
    (["run", "BUNDLE", "--class", "1", "-o", ".."], 2, "-o ..: names no file; give one, such as out.png"),
    (
        ["run", "BUNDLE", "--class", "1", "-o", "x.GIF"],
        2,
        "-o x.GIF: .gif is not written; use .png, .jpg, .jpeg, .webp",
    ),
    (["run", "BUNDLE", "-o", "OUT"], 2, BY_CLASS),
    (["run", "BUNDLE", "--prompt", "a fox", "-o", "OUT"], 2, BY_CLASS),
    (["run", "PROMPTED", "-o", "OUT"], 2, BY_PROMPT),
    (["run", "PROMPTED", "--class", "1", "-o", "OUT"], 2, BY_PROMPT),
    (["run", "PROMPTED", "--class", "1", "--prompt", "a", "-o", "OUT"], 2, "give --prompt alone"),
    (["run", "PROMPTED", "--prompt", "\udcff", "-o", "OUT"], 2, "the prompt is not valid Unicode ('\\udcff' at"),
    (["deploy", "BUNDLE", "--triton", "OUT", "--wait", "inf"], 2, "--wait"),
    (["inspect", "none.json"], 1, "none.json: no such SubNet"),
    (["verify", "nowhere"], 1, "no such bundle"),
    (["nonsense"], 2, "nonsense"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD_INPUT)
def test_bad_input_is_one_line(arguments, code, message, tiny_dit, subnet_file, bundle, prompted, tmp_path):
    places = {"MODEL": tiny_dit, "OUT": tmp_path / "out.json", "SUBNET": subnet_file, "BUNDLE": bundle}
    places["PROMPTED"] = prompted[-1]
    got, _, err = dipgo(*(places.get(argument, argument) for argument in arguments))
    (line,) = [line for line in err.splitlines() if line.startswith("dipgo: ")]
    assert got == code
    assert message in line
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
    log, output = tmp_path / "log", tmp_path / "out" / "s.json"
    output.parent.mkdir()

    def work():
        # A test run in the background inherits an ignored SIGINT; a user's terminal does not ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["dipgo", "search", tiny_dit, "--steps", "4", "--budget", "0.5", "-o", str(output)]
        sys.argv += ["--set", "drops=0", "--set", "held_out=4", "--set", "trial_iterations=100000"]
        with log.open("w", buffering=1) as sys.stderr:
            sys.stderr.isatty = lambda: True  # progress is shown in terminals alone
            cli.main()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    deadline = time.time() + 120
    while process.is_alive() and (not log.exists() or "trial" not in log.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert "dipgo: interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert list(output.parent.iterdir()) == []
