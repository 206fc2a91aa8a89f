import base64
import io
import json
import re
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench.page import write_report
from benchmarks.bench.plots import heatmap
from benchmarks.bench.report import headlines, json_schema, milliseconds, read_report
from benchmarks.bench.timing import Spread
from tests.benchmarks.test_plots import boxes
from tests.checks import misused, refused


def cells(page):
    return re.findall(r'<g class="(on|off)">', page)


def test_the_report_round_trips_as_strict_json(measured, tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    report, folder = measured
    assert read_report(folder / "report.json") == report
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    text = (folder / "report.json").read_text()
    raw, schema = json.loads(text, parse_constant=refuse), json.loads(json_schema())
    assert raw["schema"] == "dipgo.report/1"
    assert set(schema["required"]) <= set(raw) == set(schema["properties"])
    published = files("benchmarks").joinpath("schemas/report-1.json").read_text()
    assert json.loads(published) == schema, "run: python -m benchmarks.bench.report > that file"
    (tmp_path / "report.json").write_text(text.replace("dipgo.report/1", "dipgo.report/2"))
    with refused(r"dipgo\.report/2"):
        read_report(tmp_path / "report.json")


def test_the_page_maps_every_gate_and_has_a_row_a_program_in_both_tables(measured):
    report, folder = measured
    page = (folder / "report.html").read_text()
    found = cells(page)
    assert len(found) == len(report.sites) * len(report.gates)
    assert found.count("on") == np.sum(report.gates)
    for name in ("speed", "quality"):
        body = page.split(f'<table id="{name}">')[1].split("</table>")[0]
        assert re.findall(r"<tr[^>]*><td>([^<]*)</td>", body) == [row.name for row in report.rows]


def test_the_page_shows_the_images_themselves_and_needs_nothing_from_outside(measured):
    report, folder = measured
    page = (folder / "report.html").read_text()
    assert not re.search(r"http|<script|@import|url\(", page)
    begin = "data:image/png;base64,"
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 9 * sum(not row.error for row in report.rows)
    assert all(source.startswith(begin) for source in sources)
    encoded = [base64.b64decode(source.removeprefix(begin)) for source in sources]
    pictures = [np.asarray(Image.open(io.BytesIO(one))) for one in encoded]
    assert all(picture.shape == (16, 16, 3) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    assert "image-rendering: pixelated" in page
    assert "cat" in page


def test_headlines_begin_with_what_is_lost(measured):
    report, _ = measured

    def with_psnr(row, psnr, speedup=1.5):
        timing = row.timing.model_copy(update={"speedup": Spread(median=speedup, p5=speedup, p95=speedup)})
        quality = row.quality.model_copy(update={"psnr_db": psnr})
        return row.model_copy(update={"quality": quality, "timing": timing})

    full, own = report.rows[:2]
    first, second = report.row("uniform reuse"), report.row("uniform extrapolation")

    def lines_of(*rows):
        return headlines(report.model, report.sampler, [full, *rows], report.scope, report.environment)

    lines = lines_of(with_psnr(own, 30), with_psnr(first, 29), with_psnr(second, 32.25))
    assert lines[0].kind == "loss"
    assert f"Loses to '{second.name}' in PSNR: 30.0 dB against 32.2 dB" in lines[0].line
    assert not any(first.name + "'" in entry.line for entry in lines if entry.kind == "loss")

    lines = lines_of(with_psnr(own, 33), with_psnr(first, 29), with_psnr(second, 32.25))
    assert not any("Loses" in entry.line for entry in lines)
    lines = lines_of(with_psnr(own, 33, 2.0), with_psnr(first, 29, 2.5), with_psnr(second, 32))
    assert lines[0].line.endswith(f"2.00 times the full program's, against '{first.name}' 2.50.")
    assert any(f"the next best at equal compute, '{second.name}', has 32.0 dB" in entry.line for entry in lines)


def test_an_existing_folder_is_refused_without_force(measured, tmp_path):
    report, _ = measured
    pictures = {"full": np.zeros((8, 16, 16, 3), np.float32)}
    with misused("--force"):
        write_report(report, pictures, ["x"] * 8, tmp_path)
    assert not list(tmp_path.iterdir())
    write_report(report, pictures, ["x"] * 8, tmp_path, force=True)
    assert read_report(tmp_path / "report.json") == report


@pytest.mark.parametrize(("sites", "steps"), [(16, 20), (9, 50), (56, 50)])
def test_heat_maps_are_readable(sites, steps):
    gates = np.random.default_rng(0).integers(2, size=(steps, sites)).tolist()
    drawn = heatmap(gates, [f"transformer_blocks.{k}.attn1" for k in range(sites)], list(range(steps)))
    assert len(cells(drawn)) == sites * steps
    sizes = {tuple(round(side) for side in box[2:]) for box in boxes(drawn, "(?:on|off)")}
    assert len(sizes) == 1
    assert min(sizes.pop()) >= 8
    width, height = map(int, re.findall(r'<svg [^>]*width="(\d+)" height="(\d+)"', drawn)[0])
    assert width <= 1060
    assert height <= 800


def test_names_are_escaped_and_seconds_short():
    drawn = heatmap([[1], [0]], ["a<b>&"], [2, 1])
    assert "a<b>" not in drawn
    assert cells(drawn) == ["on", "off"]
    texts = {466.16: "466.2 s", 1.5: "1500 ms", 0.0123: "12.3 ms", 0.00123: "1.23 ms"}
    assert {seconds: milliseconds(seconds) for seconds in texts} == texts
