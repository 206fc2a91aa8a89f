"""``dipgo verify --debug``: find the first launch that diverges, and in it the layer or the site; write them down."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench.reference import model_of
from benchmarks.debug.differences import Difference, Values, compare, decibels, quiet, require_polygraphy
from benchmarks.debug.graphs import GRAPH, layers_of, producers, read_graph, save_alone, session, with_outputs
from benchmarks.debug.layers import FILE, Layer, compare_layers
from benchmarks.debug.walk import Launch, Walked, walk
from dipgo.base.errors import UsageError
from dipgo.base.files import new_folder, refuse_unless_new
from dipgo.base.progress import Report, silent
from export.bundle import ENGINES, Bundle, open_bundle

LAUNCHES, LAYERS, README = "launches.csv", "layers.csv", "README.md"
INPUTS, OUTPUTS = "inputs.json", "outputs.json"

_TEXT = """{finding}

- `{launches}`: the launches so far, each with its largest errors against ONNX Runtime and against torch
- `{layers}`: the layers of the graph by error
- `{graph}`, `{inputs}`, `{outputs}`: the graph, what went in, and what {who} computes

Errors are relative, ||actual - expected||_2 / ||expected||_2; the tolerance is {tolerance:.1e}. In this folder

    {replay}

compares ONNX Runtime without optimisations with what {who} computed, and fails.{shrink}
"""
_RUN = (
    "polygraphy run {graph} --onnxrt --graph-optimization-level ORT_DISABLE_ALL --load-inputs {inputs} "
    "--load-outputs {outputs} --compare snr --snr-threshold {decibels:.1f}"
)
_SHRINK = """ This shrinks the graph to the nodes at fault:

    polygraphy debug reduce {graph} -o reduced.onnx --mode=bisect --load-inputs {inputs} \\
        --fail-regex "Mismatched outputs" --check \\
        {run}
"""


def check_debug(output: Path, bundle: Path) -> None:
    """Refuse what cannot be done, before anything that takes time.

    Raises:
        UsageError: the output is there already, or a bundle of a type that ONNX Runtime's CPU has not.
        DipgoError: Polygraphy is not installed, or no bundle.
    """
    refuse_unless_new(output)
    require_polygraphy()
    if open_bundle(bundle, check_files=False).record.dtype == "bfloat16":
        raise UsageError(
            f"{bundle}: ONNX Runtime's CPU, which --debug goes by, has no bfloat16; export it in fp16 or fp32"
        )


def debug(
    folder: Path, output: Path, tolerance: float, model: str | None, backend: str, progress: Report = silent
) -> str:
    """Write into ``output`` where a bundle's programs diverge, the first that does; returns one line on it.

    Args:
        tolerance: relative error of a tensor; that of the parity of the whole.

    Raises:
        UsageError, DipgoError: see :func:`check_debug`.
    """
    check_debug(output, folder)
    programs, count = open_bundle(folder).programs, 0
    for bundle in programs:
        walked = walk(bundle, model_of(bundle, model).pipeline(), backend, tolerance, progress)
        count += len(walked.launches)
        if walked.diverges:
            break
    with new_folder(output) as draft:
        _write_table(draft / LAUNCHES, _launch_rows(walked.launches))
        if not walked.diverges:
            return f"none of {count} launches diverges by more than {tolerance:.1e}"
        progress("debug: layer by layer", 0, 1, "")
        launch = walked.launches[-1]
        locate = _locate_layer if launch.against == "backend" else _locate_site
        finding = locate(bundle, walked, draft, backend, tolerance)
    record = bundle.record
    which = f"{record.sampler.steps} steps at {record.budget:.0%}: " if len(programs) > 1 else ""
    return which + finding


def _locate_layer(bundle: Bundle, walked: Walked, folder: Path, backend: str, tolerance: float) -> str:
    """Find the layer in which the backend leaves ONNX Runtime."""
    launch = walked.launches[-1]
    path = save_alone(bundle.folder / launch.file, folder)
    layers = compare_layers(bundle, path, walked.inputs, backend, tolerance)
    where = "in no layer alone: the backend does another thing where all are fused"
    if layers.first:
        where = f"first in node '{layers.first.node}' ({layers.first.operator}), tensor '{layers.first.tensor}'"
    finding = f"{_place(launch)}: {backend} leaves ONNX Runtime, {where}"
    _write(folder, finding, layers.rows, {**walked.inputs, **layers.expected}, layers.actual, backend, tolerance)
    return finding


def _locate_site(bundle: Bundle, walked: Walked, folder: Path, backend: str, tolerance: float) -> str:
    """Find the site in which the graph leaves torch, and cut out what computes it from what torch computed before."""
    launch = walked.launches[-1]
    tensor = next(name for name, difference in launch.sites.items() if not difference.holds)
    before = [name for name, difference in launch.sites.items() if difference.holds]
    before = before[: list(launch.sites).index(tensor)]
    given = {**walked.inputs, **walked.torch}
    path = save_alone(bundle.folder / launch.file, folder, (before, tensor))
    model = read_graph(path, given)
    names = layers_of(model)
    values = session(with_outputs(model, names), folder).run(
        None, {each.name: given[each.name] for each in model.graph.input}
    )
    actual = dict(zip(names, values, strict=True))
    nodes, differences = producers(model), compare({tensor: walked.torch[tensor]}, actual, tolerance)
    rows = [Layer(nodes[name].name, nodes[name].op_type, name, differences.get(name)) for name in names]
    what = f"site '{tensor.removeprefix('feature.')}'" if tensor.startswith("feature.") else f"'{tensor}'"
    finding = f"{_place(launch)}: the graph leaves torch first in {what}, in {len(rows)} nodes to '{rows[-1].node}'"
    _write(folder, finding, rows, given, {tensor: walked.torch[tensor]}, "torch", tolerance)
    return finding


def _place(launch: Launch) -> str:
    return launch.file if launch.step is None else f"step {launch.step + 1}, {launch.file}"


def _write(
    folder: Path, finding: str, rows: Sequence[Layer], inputs: Values, outputs: Values, who: str, tolerance: float
) -> None:
    """Write the table of layers, what Polygraphy's own commands take, and how to call them."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    _write_table(folder / LAYERS, [{**_of_layer(row), **_of(row.difference)} for row in rows])
    results = RunResults()
    results.add([dict(outputs)], runner_name=who)
    with quiet():
        save_json([dict(inputs)], str(folder / INPUTS))
        results.save(str(folder / OUTPUTS))
    (folder / FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / ENGINES, ignore_errors=True)
    names = {"inputs": INPUTS, "outputs": OUTPUTS, "decibels": decibels(tolerance)}
    run = _RUN.format(graph=GRAPH, **names)
    shrink = _SHRINK.format(graph=GRAPH, run=_RUN.format(graph="polygraphy_debug.onnx", **names), **names)
    text = _TEXT.format(
        finding=finding,
        launches=LAUNCHES,
        layers=LAYERS,
        graph=GRAPH,
        who=who,
        tolerance=tolerance,
        replay=run,
        shrink="" if who == "torch" else shrink,
        **names,
    )
    (folder / README).write_text(text)


def _launch_rows(launches: Iterable[Launch]) -> list[Mapping[str, Any]]:
    def worst(differences: Mapping[str, Difference]) -> tuple[str, str]:
        if not differences:
            return "", ""
        name = max(differences, key=lambda name: (not differences[name].holds, differences[name].error))
        return name, f"{differences[name].error:.3e}"

    rows: list[Mapping[str, Any]] = []
    for launch in launches:
        (output, error), (site, site_error) = worst(launch.backend), worst(launch.sites)
        step = "" if launch.step is None else launch.step + 1
        rows.append(
            {"step": step, "graph": launch.file, "output": output, "error": error, "site": site, "to torch": site_error}
        )
    return rows


def _of_layer(layer: Layer) -> dict[str, Any]:
    return {"node": layer.node, "operator": layer.operator, "tensor": layer.tensor}


def _of(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {"error": "", "finite": "", "holds": ""}
    return {"error": f"{difference.error:.3e}", "finite": difference.finite, "holds": difference.holds}


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
