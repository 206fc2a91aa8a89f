import re

import pytest
import yaml

from benchmarks.bench.suite import FOLDER, Suite, load_suite, suites
from dipgo.model.models import architectures
from engines.backends import BACKENDS
from tests.checks import misused

ABOUT = "about: mine\n"


def test_all_that_ship_are_read_and_say_how_to_run_them():
    on_gpu = ["gpu-dit-xl", "gpu-flux", "gpu-pixart", "gpu-sd15", "gpu-sdxl"]
    assert suites() == [
        "digits-flux",
        "dit-xl",
        "emoji-sd",
        *on_gpu,
        "pixart",
        "quality",
        "quick",
        "sd15",
        "sd15-cpu",
        "sdxl",
    ]
    for name in suites():
        suite = load_suite(name)
        assert suite.about
        assert "full" not in suite.baselines
        first = (FOLDER / f"{name}.yaml").read_text().splitlines()
        commands = [line for line in first if line.startswith("# dipgo ")]
        assert any("dipgo bench build/" in line and f"--suite {name} " in line for line in commands)
        assert bool(suite.workload) == (name in on_gpu)
        assert set(suite.backends) <= BACKENDS.keys()
        if suite.workload:
            assert suite.workload.model in architectures()


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(ABOUT + "baselines: [fewer steps, 'DeepCache, N = 3']\nscopes: [loop]\nimages: 3\n")
    suite = load_suite(str(file))
    assert suite == Suite(about="mine", baselines=["fewer steps", "DeepCache, N = 3"], scopes=["loop"], images=3)
    assert suite.changed(images=9, repeats=None).images == 9
    assert suite.changed(images=9).repeats == suite.repeats
    file.write_text(yaml.safe_dump(suite.model_dump()))
    assert load_suite(str(file)) == suite


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ABOUT + "rounds: 3\n", "unknown option 'rounds'; did you mean 'seconds'?"),
        (ABOUT + "repeats: none\n", "repeats = 'none': "),
        (ABOUT + "repeats: 0\n", "repeats = 0: "),
        (ABOUT + "scopes: [wall]\n", "scopes = 'wall': "),
        (ABOUT + "baselines: [slower steps]\n", "unknown baseline 'slower steps'; did you mean 'fewer steps'?"),
        ("images: 3\n", "about is missing"),
        ("- about\n", "not a suite"),
        ("about: [\n", "not a readable suite"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, why):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with misused(f"^{file}: .*{re.escape(why)}"):
        load_suite(str(file))


def test_one_that_is_not_there():
    for name in ("quicker", "no/such.yaml", "quick.json"):
        with misused(f"no suite '{name}'; use digits-flux, dit-xl, emoji-sd, gpu-dit-xl, gpu-flux, .*, quality, quick"):
            load_suite(name)
