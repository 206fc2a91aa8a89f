"""A bundle as text."""

from __future__ import annotations

from export.bundle import Bundle


def bundle_text(bundle: Bundle) -> str:
    """Graphs, slots and sizes of a bundle."""
    record = bundle.record
    launches = sum(step.graph is not None for step in record.steps)
    slots = sum(slot.bytes for slot in record.slots)
    sizes = {name: entry.bytes for name, entry in record.files.items()}
    graphs = sum(sizes[graph.file] for graph in record.graphs.values())
    used = {name: sum(step.graph == name for step in record.steps) for name in record.graphs}
    lines = [
        "",
        f"program    {len(record.steps)} steps, {launches} launches, {len(record.graphs)} graphs",
        f"slots      {len(record.slots)} slots, {_size(slots)}; "
        f"all sites kept would take {_size(record.naive_cache_bytes)}",
        f"files      {_size(sizes[record.weights_file])} weights, {_size(graphs)} graphs, "
        f"{_size(sizes[record.decoder.file])} decoder, {_size(sum(sizes.values()))} in all",
        "",
    ]
    for name, graph in record.graphs.items():
        computed = graph.signature.count("1")
        lines.append(
            f"{name}  {computed:>3}/{len(graph.signature)} sites  {graph.macs / 1e6:10.1f} M MACs  "
            f"{used[name]:>3} steps  {_size(sizes[graph.file])}"
        )
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} B"
