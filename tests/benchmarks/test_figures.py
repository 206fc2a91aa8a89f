import json

import pytest

from benchmarks.pages.figures import tables
from benchmarks.pages.results import ROOT

RECORD = {
    "model": "tiny",
    "served": 12345,
    "latency": {"p50": 15191.4, "p95": 0.00123456},
    "samples": [1.5, 2.5],
    "long": list(range(40)),
    "runs": [{"what": "a", "parts": {"loop": 7}}, {"what": "b", "parts": {"loop": 9}, "error": None}],
    "memory": {"before": {"gate": 1}, "after": {"gate": 2}},
}


def test_single_figures_and_collections():
    assert tables(RECORD) == [
        "| figure | value |",
        "| --- | --- |",
        "| model | tiny |",
        "| served | 12,345 |",
        "| latency, p50 | 15,191 |",
        "| latency, p95 | 0.001235 |",
        "| samples | 1.5, 2.5 |",
        "| long | 40 entries |",
        "",
        "runs:",
        "",
        "| what | parts, loop | error |",
        "| --- | --- | --- |",
        "| a | 7 |  |",
        "| b | 9 | – |",
        "",
        "memory:",
        "",
        "|  | gate |",
        "| --- | --- |",
        "| before | 1 |",
        "| after | 2 |",
    ]


def test_parts_with_figures_in_common_stand_side_by_side_and_large_counts_are_rounded():
    calm, full = {"clients": 4, "peak_bytes": 50_995_200}, {"clients": 192, "refused": {"503": 315}}
    assert tables({"batch": 1, "calm": calm, "full": full, "other": {"left": 2}}) == [
        "| figure | value |",
        "| --- | --- |",
        "| batch | 1 |",
        "| other, left | 2 |",
        "",
        "| figure | calm | full |",
        "| --- | --- | --- |",
        "| clients | 4 | 192 |",
        "| peak bytes | 51.00 M |  |",
        "| refused, 503 |  | 315 |",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_every_row_has_its_tables_columns(path):
    bars = 0
    for line in tables(json.loads(path.read_text())):
        if not line.startswith("|"):
            bars = 0  # the next line with bars begins another table
        else:
            bars = bars or line.count("|")
            assert line.count("|") == bars
