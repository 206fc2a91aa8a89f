"""A bundle as text."""

from __future__ import annotations

from dipgo.base.units import size
from export.bundle import Bundle
from export.records.bundle import BundleRecord

_PARTS = {
    "table": "while compiling",
    "prompt": "once a prompt",
    "steps": "before the loop, all steps in one batch",
    "loop": "in the loop",
}


def bundle_text(bundle: Bundle) -> str:
    """Programs, graphs, slots, parts and sizes of a bundle."""
    record, programs = bundle.record, bundle.record.programs
    files = {name: entry.bytes for name, entry in record.files.items()}
    weights = sum(count for name, count in files.items() if "/" in name)
    graphs = sum(count for name, count in files.items() if name.endswith(".onnx"))
    lines = [
        "",
        *([f"sizes      {_axes(bundle)}; slots and sites at the largest, MACs at the best"] if record.axes else []),
        f"files      {size(weights)} weights ({record.weights}), {size(graphs)} graphs, "
        f"{size(sum(files.values()))} in all"
        + (", random weights: images are meaningless" if record.random_weights else ""),
        *(
            [f"programs   {len(programs)}, the first where a request names neither steps nor budget"]
            if record.further
            else []
        ),
    ]
    for own in programs:
        lines += ["", *_program(own)]
    lines.append("")
    for name, graph in record.graphs.items():
        computed = graph.signature.count("1")
        times = [sum(launch.graph == name for step in own.steps for launch in step.launches) for own in programs]
        lines.append(
            f"{name}  {computed:>3}/{len(graph.signature)} sites  {graph.macs / 1e9:9.3f} G MACs  "
            f"{graph.parameters / 1e6:8.2f} M parameters  {' '.join(f'{count:>3}' for count in times)} launched  "
            f"{size(files[graph.file])}"
        )
    return "\n".join(lines)


def _program(record: BundleRecord) -> list[str]:
    launches = [launch.graph for step in record.steps for launch in step.launches]
    silent = sum(not step.launches for step in record.steps)
    solver = "in the graphs" if record.solver.kind == "graph" else "on the host"
    solver += f", draws noise {record.solver.draws} times" if record.solver.draws else ""
    pictures = "; from pictures too" if record.start else ""
    return [
        f"program    {record.sampler.steps} steps at {record.budget:.1%} of the MACs: {len(record.steps)} calls, "
        f"{silent} of them silent, {len(launches)} launches of {len(record.graphs)} graphs, one per {record.layout}; "
        f"{record.dtype}, solver {solver}{pictures}",
        f"slots      {len(record.slots)} slots, {size(sum(slot.bytes for slot in record.slots))}; "
        f"all sites kept would take {size(record.naive_cache_bytes)}",
        "",
        f"{'computed':<40} {'parameters':>14} {'MACs':>12}",
        *(
            f"{_PARTS[part.part]:<40} {part.parameters / 1e6:>12.2f} M {part.macs / 1e9:>10.3f} G"
            for part in record.parts
        ),
    ]


def _axes(bundle: Bundle) -> str:
    """Return the ranges: of the batch in images, of sides in pixels."""
    cells = {"batch": 1}
    parts = []
    for name, axis in bundle.record.axes.items():
        unit = cells.get(name, bundle.record.cell)
        step = f" by {axis.multiple * unit}" if axis.multiple * unit > 1 else ""
        parts.append(f"{name} {axis.min * unit} to {axis.max * unit}{step}, best {axis.opt * unit}")
    return "; ".join(parts)
