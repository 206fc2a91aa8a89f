"""The examples run as they stand, as real processes, and do what they say."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
PRINTS = {
    "quickstart.py": "5 images in ",
    "drop_in.py": " dB to the full pipeline's image",
    "custom_model.py": "5 sites, ",
}
PICTURES = {"quickstart.py": 5, "drop_in.py": 0, "custom_model.py": 1}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_runs(path, tmp_path):
    assert len(path.read_text().splitlines()) <= 45
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, path, tmp_path / "out"]
    made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parents[1], env=environment)
    assert made.returncode == 0, made.stderr[-2000:]
    assert PRINTS[path.name] in made.stdout
    pictures = list((tmp_path / "out").glob("*.png"))
    assert len(pictures) == PICTURES[path.name]
    for picture in pictures:
        with Image.open(picture) as image:
            assert np.asarray(image).std() > 1
    if path.name == "drop_in.py":
        assert float(made.stdout.split(", ")[1].split(" dB")[0]) > 15
