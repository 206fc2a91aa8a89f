"""Recipes: those that ship make sense, those of the built-in models run, and bad ones are one line."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dipgo.cli.recipe_file import FOLDER, read_recipe, shipped
from dipgo.schedule.subnet import load_subnet
from dipgo.searching.config import SearchConfig
from tests.checks import refused
from tests.command import dipgo
from tests.zoo import LEAST

HEAD = "schema: dipgo.recipe/1\nabout: mine\nmodel: digits-dit\noutput: out\n"


def run(*arguments):
    """Run ``dipgo recipe`` in this process; returns exit code, stdout, stderr."""
    return dipgo("recipe", *arguments)


@pytest.mark.parametrize("name", shipped())
def test_those_that_ship_make_sense_and_begin_with_their_command(name, tmp_path, monkeypatch):
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    command, recipe, verb, file = shlex.split(first.removeprefix("# "))
    assert (command, recipe, verb) == ("dipgo", "recipe", "run")
    monkeypatch.chdir(tmp_path)
    assert run("cp", name)[:2] == (0, f"recipe: {file}\n")
    assert run("cp", name)[0] == 2, "a recipe that was changed is not replaced"
    code, out, _ = run("validate", file)
    assert code == 0
    assert out.startswith(f"{file}: ")
    code, out, _ = run("ls")
    assert any(line.split()[0] == name for line in out.splitlines())


def test_all_that_were_promised_ship():
    big = {"sd-1.5", "sd-2.1", "sdxl", "dit-xl-2", "pixart-alpha"}
    assert set(shipped()) == {"digits-dit", "digits-flux", "emoji-sd", *big, *(f"sd-1.5-{job}" for job in JOBS)}
    assert read_recipe(Path("sd-1.5-paper-train")).search.method == "paper"


JOBS = ("paper-train", "evaluate", "demo")


def test_emoji_sd_has_the_settings_of_the_published_subnet():
    """But for those that only the paper's method reads, whose defaults have changed, and what is no more."""
    file = Path(__file__).parents[1] / "benchmarks" / "subnets" / "emoji-sd" / "ddim-50" / "layer.json"
    published, search = load_subnet(file), read_recipe(Path("emoji-sd")).search
    renamed = {"terms": "history", "by_half": "by_pass"}
    recorded = json.loads(file.read_text())["search"]["settings"]
    settings = {renamed.get(name, name): value for name, value in recorded.items()}
    paper = {name for name, field in SearchConfig.model_fields.items() if field.description.startswith("The paper")}
    own = {name: value for name, value in search.deciding().items() if name not in paper}
    assert own == {name: settings.get(name, True) for name in own}
    assert (search.steps, search.budget) == (published.sampler.steps, (0.2,))
    assert search.prompts.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-dit", "digits-flux", "emoji-sd"])
def test_those_of_the_built_in_models_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so prompts are found where dipgo is installed
    small = [f"search.{name}={value}" for name, value in LEAST.items()]
    more = ["search.steps=3", "search.budget=0.7", "verify.images=1", "bench=null", "run.number=2", "output=here"]
    code, out, err = run("run", name, *small, *more)
    assert code == 0, err
    assert "parity holds" in out
    assert load_subnet(Path("here/subnet.json")).cost.ratio <= 0.7
    with Image.open("here/images.png") as picture:
        assert np.asarray(picture).std() > 1
    code, _, err = run("run", name, *small, *more)
    assert code == 2
    assert "exists; give another path, or --force" in err


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (HEAD + "serch: {steps: 4}\n", [], "unknown option 'serch'; did you mean 'search'?"),
        (HEAD + "search: {steps: 4, budgt: 0.5}\n", [], "unknown option 'search.budgt'; did you mean 'budget'?"),
        (HEAD + "search: {steps: x, budget: 0.5}\n", [], "search.steps = 'x': should be a valid integer"),
        (HEAD + "search: {steps: 4, budget: 2}\n", [], "search.budget = 2: budget 2 is outside (0, 1]"),
        (HEAD + "search: {steps: 4}\n", [], "search.budget is missing"),
        (HEAD + "bench: {images: 3}\n", [], "bench.images = 3: should be greater than or equal to 8"),
        (HEAD + "export: {dtype: fp8}\n", [], "export.dtype = 'fp8': should be 'fp32', 'fp16' or 'bf16'"),
        (HEAD + "export: {}\n", [], "exports nothing; give a search, or the file of a subnet"),
        (HEAD + "search: 3\n", [], "search = 3: should be a valid dictionary"),
        (HEAD.replace("/1", "/2"), [], "schema is 'dipgo.recipe/2', this version reads 'dipgo.recipe/1'"),
        ("- 1\n", [], "schema is None"),
        ("a: [\n", [], "not a readable recipe"),
        (HEAD, ["search.nope=1"], "unknown option 'search.nope'"),
        (HEAD, ["nope=1"], "unknown option 'nope'"),
        (HEAD, ["model.x=1"], "'model' is one value, without keys"),
        (HEAD, ["search.budget"], "give KEY=VALUE, such as search.budget=0.2"),
        (None, [], "no such file, and unknown recipe"),
    ],
)
def test_bad_ones_are_one_line(text, overrides, message, tmp_path):
    file = tmp_path / "mine.yaml"
    if text:
        file.write_text(text)
    with refused(re.escape(message)) as caught:
        read_recipe(file, overrides)
    assert str(file) in str(caught.value) or overrides


def test_several_budgets_of_a_paper_search_are_searched_alone(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(HEAD + "search: {steps: 4, budget: [0.5, 0.35]}\nexport: {}\n")
    with refused(r"search\.budget has several"):
        read_recipe(file)
    assert read_recipe(file, ["export=null"]).search.budget == (0.5, 0.35)


def test_what_ships_is_found_from_a_folder_elsewhere(tmp_path):
    script = "from pathlib import Path; from dipgo.cli.recipe_file import read_recipe; "
    script += "print(read_recipe(Path('emoji-sd')).search.prompts.is_file())"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
