"""A bundle as text."""

from __future__ import annotations

from dipgo.base.units import size
from export.bundle import Bundle

_PARTS = {
    "table": "while compiling",
    "prompt": "once a prompt",
    "steps": "before the loop, all steps in one batch",
    "loop": "in the loop",
}


def bundle_text(bundle: Bundle) -> str:
    """Graphs, slots, parts and sizes of a bundle."""
    record = bundle.record
    launches = [launch.graph for step in record.steps for launch in step.launches]
    silent = sum(not step.launches for step in record.steps)
    slots = sum(slot.bytes for slot in record.slots)
    files = {name: entry.bytes for name, entry in record.files.items()}
    weights = sum(count for name, count in files.items() if "/" in name)
    own = sum(count for name, count in files.items() if name.endswith(".onnx"))
    solver = "in the graphs" if record.solver.kind == "graph" else "on the host"
    solver += f", draws noise {record.solver.draws} times" if record.solver.draws else ""
    lines = [
        "",
        f"program    {len(record.steps)} steps, {silent} of them silent, {len(launches)} launches of "
        f"{len(record.graphs)} graphs, one a {record.layout}; {record.dtype}, solver {solver}",
        *([f"sizes      {_axes(bundle)}; slots and sites at the largest, MACs at the best"] if record.axes else []),
        f"slots      {len(record.slots)} slots, {size(slots)}; "
        f"all sites kept would take {size(record.naive_cache_bytes)}",
        f"files      {size(weights)} weights ({record.weights}), {size(own)} graphs, "
        f"{size(sum(files.values()))} in all"
        + (", random weights: images are meaningless" if record.random_weights else ""),
        "",
        f"{'computed':<40} {'parameters':>14} {'MACs':>12}",
    ]
    lines += [
        f"{_PARTS[part.part]:<40} {part.parameters / 1e6:>12.2f} M {part.macs / 1e9:>10.3f} G" for part in record.parts
    ]
    lines.append("")
    for name, graph in record.graphs.items():
        computed = graph.signature.count("1")
        lines.append(
            f"{name}  {computed:>3}/{len(graph.signature)} sites  {graph.macs / 1e9:9.3f} G MACs  "
            f"{graph.parameters / 1e6:8.2f} M parameters  {launches.count(name):>3} launched  "
            f"{size(files[graph.file])}"
        )
    return "\n".join(lines)


def _axes(bundle: Bundle) -> str:
    """Return the ranges: of the batch in images, of sides in pixels."""
    cells = {"batch": 1}
    parts = []
    for name, axis in bundle.record.axes.items():
        unit = cells.get(name, bundle.record.cell)
        step = f" by {axis.multiple * unit}" if axis.multiple * unit > 1 else ""
        parts.append(f"{name} {axis.min * unit} to {axis.max * unit}{step}, best {axis.opt * unit}")
    return "; ".join(parts)
