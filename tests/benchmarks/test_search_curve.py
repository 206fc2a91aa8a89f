"""The curve of quality against time, from the journal of a real search."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import search_curve
from dipgo.searching.config import SearchConfig
from dipgo.searching.search import search
from tests import zoo
from tests.checks import refused


def test_the_curve_is_the_mean_of_the_last_batches_over_the_time_learned(tmp_path):
    folder, output = tmp_path / "run", tmp_path / "curve.png"
    small = zoo.LEAST | {"chunk": 2, "held_out": 1, "backup_iterations": 20, "run_folder": folder}
    search(zoo.task("dit", 3), SearchConfig(steps=3, budget=0.6, preset="quick", **small))
    lines = search_curve.journal_of(folder)
    ((budget, (seconds, quality)),) = search_curve.curves(folder).items()
    assert budget == "0.6"
    assert len(seconds) == len(quality) == len(lines) - search_curve.WINDOW + 1
    assert (np.diff(seconds) > 0).all()
    assert seconds[-1] == pytest.approx(sum(line["seconds"] for line in lines))
    assert quality[-1] == pytest.approx(np.mean([-line["loss"] for line in lines[-search_curve.WINDOW :]]))
    search_curve.main([str(folder), "-o", str(output)])
    with Image.open(output) as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 10

    journal, run = folder / "journal.jsonl", folder / "run.json"
    journal.write_text("\n".join(journal.read_text().splitlines()[:5]))
    with refused("fewer than 20 iterations"):
        search_curve.curves(folder)
    run.write_text(run.read_text().replace('"psnr"', '"l1"'))
    with refused("did not learn by PSNR"):
        search_curve.curves(folder)
    with refused("no journal in it"):
        search_curve.curves(tmp_path)
