"""The demo in a real process: its picture shows what its table says, and its bundle runs."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench.demo import PROMPTS
from benchmarks.bench.strips import LEFT
from tests.command import dipgo

COMMAND = [sys.executable, "-m", "dipgo", "demo"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run([*COMMAND, "-o", folder / "demo"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "demo", done.stdout


def test_dipgo_is_closer_to_the_full_images_than_plain_steps(shown):
    folder, text = shown
    psnr = {name: float(db) for name, db in re.findall(r"^(dipgo|\d+ plain steps) .* (\S+) dB", text, re.MULTILINE)}
    own, (plain,) = psnr.pop("dipgo"), psnr.values()
    assert own > plain + 5
    with Image.open(folder / "picture.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), float)
    rows = np.split(pixels[:, LEFT:], 3)  # the full model's images, dipgo's, plain steps'
    assert all(row.shape[1] == len(PROMPTS) * row.shape[0] for row in rows)
    assert np.square(rows[1] - rows[0]).mean() < np.square(rows[2] - rows[0]).mean()


def test_its_bundle_runs_and_is_not_replaced(shown, tmp_path):
    folder, text = shown
    assert f"picture: {folder / 'picture.png'}" in text
    assert dipgo("run", folder, "--prompt", "red apple", "-o", tmp_path / "x.png").code == 0
    code, _, err = dipgo("demo", "-o", folder)
    assert code == 2
    assert "--force" in err
