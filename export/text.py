"""A pipeline's text encoders as one ONNX graph, prompt tokens to conditions, and its tokenizers as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import nn

from dipgo.base.errors import DipgoError
from dipgo.base.records import read_json
from dipgo.model.families import Prompting, latent_size
from dipgo.model.models import Model
from export.component_weights import bind_component, own_weights
from export.components import VAE, component_config, components_of, empty_component
from export.onnx.convert import convert, export_module, tensor_record
from export.onnx.weights import Weights
from export.records.conditioning import TextRecord, TokenizerRecord
from export.records.graphs import Size
from export.sizes import Sizes
from export.tokenizer_files import tokenizer_of

FILE, NEGATIVE_FILE = "text_encoder.onnx", "negative_text_encoder.onnx"
Graphs = dict[str, ir.Model]


def text_to_onnx(
    model: Model,
    rows: int,
    dtype: torch.dtype,
    weights: Mapping[str, Weights] | None = None,
    sizes: Sizes | None = None,
) -> tuple[Graphs, TextRecord, dict[str, bytes]] | None:
    """Convert the text encoders to one graph for ``rows`` prompts at a time, and write out the tokenizers.

    Inputs are ``input_ids`` ``[rows, tokens]`` int64, ``input_ids_2`` for a second tokenizer, and ``attention_mask``
    where an encoder takes one. Outputs are the conditions that depend on the prompt, in ``dtype``, then
    ``encoder_hidden_states.1``, … with one, … of the last layers skipped. ``weights`` gives
    those of each encoder; None takes the folder's own, as they are. ``sizes`` None are the model's own.
    Where negative prompts are read in another way they have a graph of their own.

    Returns:
        Graphs by file, the record, and the contents of the tokenizer files by name; None for a family without prompts,
        or a folder without text encoders.

    Raises:
        DipgoError: a folder that is incomplete or damaged, weights of another model or dtype, or a text encoder that
            does not fit the denoiser.
    """
    prompting = model.family.prompting(model.config)
    names = [name for name in components_of(model) if name != VAE]
    if prompting is None or not names:
        return None
    own = (names, rows, dtype, weights)
    graph, record, files = _converted(model, prompting, FILE, *own)
    graphs, negative = {FILE: graph}, None
    if prompting.negative:
        other, negative, more = _converted(model, prompting.negative, NEGATIVE_FILE, *own)
        graphs, files = graphs | {NEGATIVE_FILE: other}, files | more
    fixed = {}
    if not model.family.under:
        fixed = _fixed(model, prompting, sizes.latent_at("opt")[2:] if sizes else latent_size(model.config))
    sized = _sized(model, prompting, sizes) if sizes and sizes.axes else {}
    return graphs, record.model_copy(update={"negative": negative, "fixed": fixed, "sized": sized}), files


def _converted(
    model: Model,
    prompting: Prompting,
    file: str,
    names: Sequence[str],
    rows: int,
    dtype: torch.dtype,
    weights: Mapping[str, Weights] | None,
) -> tuple[ir.Model, TextRecord, dict[str, bytes]]:
    pairs = [tokenizer_of(model, prompting, name, number) for number, name in enumerate(names)]
    tokenizers = [record for record, _ in pairs]
    module = _Text([empty_component(model, name, dtype) for name in names], prompting, tokenizers, dtype)
    what = "the text encoder"
    program = export_module(what, module, [torch.ones((rows, length), dtype=torch.int64) for length in module.lengths])
    skips = prompting.skips([encoder.config for encoder in module.encoders])
    outputs = [*prompting.conditions, *(f"{prompting.conditions[0]}.{skip + 1}" for skip in range(skips))]
    graph = convert(what, program, module.inputs, outputs, (rows, module.lengths[0]))
    tokenizers = _without_idle_masks(graph, tokenizers)
    for number, name in enumerate(names):
        own = weights[name] if weights is not None else own_weights(model, name)
        bind_component(graph, f"encoders.{number}.", model, module.encoders[number], own)
    graph.graph.name, graph.producer_name = "text_encoder", "dipgo"
    _check_conditions(model, graph, rows)
    index = read_json(model.folder / "model_index.json", "model_index.json")
    record = TextRecord(
        file=file,
        tokenizers=tokenizers,
        inputs=[tensor_record(value) for value in graph.graph.inputs],
        outputs=[tensor_record(value) for value in graph.graph.outputs],
        unconditional="zeros"
        if prompting.always_zeros or (prompting.zeros and index.get(prompting.zeros))
        else "encoded",
        lower=prompting.lower,
        fixed={},
    )
    return graph, record, {record.file: content for record, content in pairs}


def _without_idle_masks(graph: ir.Model, tokenizers: Sequence[TokenizerRecord]) -> list[TokenizerRecord]:
    """Take masks that no encoder reads out of the graph's inputs, and out of the records."""
    idle = {value.name for value in graph.graph.inputs if not value.uses()} & {each.mask for each in tokenizers}
    for value in [value for value in graph.graph.inputs if value.name in idle]:
        graph.graph.inputs.remove(value)
    return [each.model_copy(update={"mask": None}) if each.mask in idle else each for each in tokenizers]


class _Text(nn.Module):
    """Token ids of each tokenizer, then the masks, to conditions in ``dtype``."""

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        prompting: Prompting,
        records: Sequence[TokenizerRecord],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.prompting = prompting
        self.ids = [record.ids for record in records]
        self.masks = [record.mask for record in records]
        self.lengths = [record.length for record in (*records, *(record for record in records if record.mask))]
        self.dtype = dtype

    @property
    def inputs(self) -> list[str]:
        return [*self.ids, *(mask for mask in self.masks if mask)]

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = dict(zip(self.inputs, values, strict=True))
        masks = [inputs[mask] if mask else None for mask in self.masks]
        conditions = self.prompting.encode(list(self.encoders), [inputs[ids] for ids in self.ids], masks)
        return tuple(value.to(self.dtype) for value in conditions)


def _check_conditions(model: Model, graph: ir.Model, rows: int) -> None:
    """Refuse text encoders of another width than the denoiser's."""
    expected = model.family.example(model.config, rows)
    for value in graph.graph.outputs:
        record = tensor_record(value)
        name = record.name.partition(".")[0]
        if name not in expected or record.shape != list(expected[name].shape):
            shape = list(expected[name].shape) if name in expected else "none"
            raise DipgoError(
                f"{model.folder}: the text encoder makes '{record.name}' {record.shape}, the denoiser takes {shape}; "
                "they belong to different models"
            )


def _fixed(model: Model, prompting: Prompting, size: Sequence[int]) -> dict[str, list[float]]:
    """Return the conditions that do not depend on the prompt, for a latent of this height and width."""
    config = model.config if tuple(size) == latent_size(model.config) else model.config | {"sample_size": list(size)}
    return {name: value[0].tolist() for name, value in prompting.fixed(config, _vae_scale(model)).items()}


def _sized(model: Model, prompting: Prompting, sizes: Sizes) -> dict[str, list[Size]]:
    """Return those of them that follow the latent's size as expressions over the axes; they are linear in it."""
    sides: list[str] = [name for name in ("height", "width") if name in sizes.axes]
    height, width = sizes.latent_at("opt")[2:]
    best: dict[str, int] = {"height": height, "width": width}

    def at(changes: Mapping[str, int]) -> dict[str, list[float]]:
        return _fixed(model, prompting, list((best | dict(changes)).values()))

    nothing = dict.fromkeys(sides, 0)
    start, steps, there = at(nothing), [at(nothing | {side: 1}) for side in sides], at({})
    sized: dict[str, list[Size]] = {}
    for name, row in there.items():
        entries: list[Size] = []
        for place, value in enumerate(row):
            first = start[name][place]
            slopes = [step[name][place] - first for step in steps]
            if value != first + sum(slope * best[side] for slope, side in zip(slopes, sides, strict=True)):
                raise DipgoError(f"{model.name}: '{name}' does not follow the image's size linearly; not supported")
            terms = [f"{int(slope)}*{side}" for slope, side in zip(slopes, sides, strict=True) if slope]
            entries.append("+".join([*terms, str(int(first))]) if terms else int(first))
        if row != start[name]:
            sized[name] = entries
    return sized


def _vae_scale(model: Model) -> int:
    """Return how many pixels a cell of the latent has a side, as pipelines reckon it."""
    levels = component_config(model, VAE).get("block_out_channels") if VAE in components_of(model) else None
    return 2 ** (len(levels) - 1) if levels else 8
