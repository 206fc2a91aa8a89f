import base64
import io
import json
import re
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench.headline import headlines
from benchmarks.bench.page import write_report
from benchmarks.bench.plots import heatmap
from benchmarks.bench.report import json_schema, milliseconds, read_report
from benchmarks.bench.strips import LEFT, shown
from benchmarks.bench.timing import timing_of
from tests.benchmarks.test_plots import boxes
from tests.checks import misused, refused


def cells(page):
    return re.findall(r'<g class="(on|off)">', page)


def names_in(page, table):
    body = page.split(f'<table id="{table}">')[1].split("</table>")[0]
    return [name.strip() for name in re.findall(r"<tr[^>]*><td>([^<]*)<", body)]


def test_the_report_round_trips_as_strict_json(measured, tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    report, folder = measured
    assert read_report(folder / "report.json") == report
    assert sorted(path.name for path in folder.iterdir()) == ["picture.png", "report.html", "report.json", "report.md"]
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
        assert names_in(page, name) == [row.name for row in report.rows]
    timed = [row for row in report.rows if row.timing]
    fastest_first = sorted(timed, key=lambda row: row.timing.wall.median)
    assert names_in(page, "summary") == [*(row.name for row in fastest_first), "crash"]


def test_the_page_shows_the_images_themselves_and_needs_nothing_from_outside(measured):
    report, folder = measured
    page = (folder / "report.html").read_text()
    assert not re.search(r"http|<script|@import|url\(", page)
    begin = "data:image/png;base64,"
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    made = sum(not row.error for row in report.rows)
    assert len(sources) == 8 * (2 * made - 1), "images of each, and differences of all but the full program"
    assert all(source.startswith(begin) for source in sources)
    encoded = [base64.b64decode(source.removeprefix(begin)) for source in sources]
    pictures = [np.asarray(Image.open(io.BytesIO(one))) for one in encoded]
    assert all(picture.shape == (16, 16, 3) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    assert "image-rendering: pixelated" in page
    assert "cat" in page
    worst = int(np.argmin(report.row("dipgo").quality.each_psnr_db))
    assert "worst of 9: " in page
    places, worst_too = shown(report.rows, 9, (16, 16))
    assert (len(places), places[-1], worst_too) == (8, worst, worst)
    order = re.findall(r"<tr><td>([^<]*)<br>", page.split('class="strips"')[1])
    assert order == names_in(page, "summary")[: len(order)], "by wall time"
    pixels = np.asarray(Image.open(folder / "picture.png").convert("RGB"), int)
    full, own, plain = np.split(pixels, 3)
    assert full[:, LEFT:].std() > 0
    for other in (own, plain):
        assert 0 < np.abs(full - other)[:, LEFT:].mean() < 128, "alike and not the same"


def changed(row, psnr, speedup, spread=0.0):
    """A row with another mean PSNR and another speed in each of its rounds, these apart by ``spread``."""
    samples = [1 / speedup * (1 + spread * (-1) ** number) for number in range(20)]
    quality = row.quality.model_copy(update={"psnr_db": psnr, "each_psnr_db": [psnr - 1, psnr, psnr + 1] * 3})
    timing = timing_of(samples, [1.0] * 20)
    return row.model_copy(update={"quality": quality, "timing": timing, "efficiency": 1.0})


def lines_of(report, *rows, seconds=None):
    rows = [changed(report.rows[0], 150, 1.0), *rows]
    return headlines(report.model, report.sampler, rows, report.scope, report.environment, seconds)


def losses(report, *rows):
    return [entry.line for entry in lines_of(report, *rows) if entry.kind == "loss"]


def test_headlines_begin_with_the_trade(measured):
    report, _ = measured
    own, fewer = changed(report.row("dipgo"), 41.8, 2.35), changed(report.row("fewer steps"), 30.1, 2.8)
    equal = changed(report.row("fewer steps, equal time"), 34.0, 2.4)
    first, *rest = lines_of(report, own, fewer, equal, seconds=100)
    assert first.kind == "result"
    assert first.line == (
        "2.35 times as fast, 41.8 dB from the full images; "
        f"{fewer.steps} plain steps (equal MACs): 2.80 times, 30.1 dB; "
        f"{equal.steps} plain steps (equal time): 2.40 times, 34.0 dB."
    )
    assert rest[1].line == "The search took 100 s; with 574 ms saved per run it has paid after 175 runs."
    plain = own.model_copy(update={"quality": None})
    assert lines_of(report, plain)[0].line == "2.35 times as fast as the full program."


def test_a_loss_is_told_only_beyond_chance(measured):
    report, _ = measured
    own, row = changed(report.row("dipgo"), 40, 2.0), report.row("uniform reuse")
    (line,) = losses(report, own, changed(row, 41, 2.0))
    assert line.startswith("Loses to 'uniform reuse' in PSNR by 1.0 dB per image (1.0 to 1.0), at 2.00 times")
    wavering = changed(row, 40.1, 1.0)
    each = [value + (-1) ** number for number, value in enumerate(wavering.quality.each_psnr_db)]
    wavering = wavering.model_copy(update={"quality": wavering.quality.model_copy(update={"each_psnr_db": each})})
    assert losses(report, own, wavering) == []
    (line,) = losses(report, own, changed(row, 39, 2.1))
    assert line == "Loses in speed: 2.00 times the full program's, against 'uniform reuse' 2.10."
    assert losses(report, own, changed(row, 39, 2.01, spread=0.2)) == []
    fewer = {"macs_ratio": 0.1}
    assert losses(report, own, changed(row, 39, 9.0).model_copy(update=fewer)) == [], "a trade, with fewer MACs"
    costly = {"macs_ratio": 0.9}
    assert losses(report, own, changed(row, 39, 2.1).model_copy(update=costly)) == [], "a trade, with more MACs"
    assert losses(report, own, changed(row, 41, 1.5).model_copy(update=costly)) == []
    assert "in PSNR" in losses(report, own, changed(row, 41, 2.1).model_copy(update=costly))[0]
    assert any(line.startswith("Slower than the full program: 0.50") for line in losses(report, changed(own, 40, 0.5)))


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
