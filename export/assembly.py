"""A SubNet put together as a program: launches, graphs, prologues, tables and slots, ready to be written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir

from dipgo.base.dtypes import Dtype
from dipgo.base.files import sha256_of_json
from dipgo.graph.liveness import plan
from dipgo.graph.trace import Trace
from dipgo.model.families.pictures import usual_strengths
from dipgo.model.sampler import Sampler
from dipgo.model.starts import Starts
from dipgo.schedule.schedule import backup_outputs
from dipgo.schedule.subnet import SubNet
from export.axes import values_at
from export.converted import Prepared, stem_of
from export.onnx.convert import tensor_record
from export.onnx.denoiser_graph import DenoiserGraph
from export.onnx.macs import node_macs, weights_read
from export.plan.cut import SOLVER, Cut, Loop
from export.plan.hoisting import parts
from export.plan.launches import EPSILON, LATENT, Launch, Value
from export.plan.layouts import LAYOUTS
from export.plan.program import Program, Work
from export.plan.prologue import Prologue
from export.plan.slots import Allocation, allocate, bytes_of, prune
from export.plan.solver import Recurrence, recurrence
from export.records.graphs import GraphRecord, TensorRecord
from export.records.program import PartRecord, ProgramRecord, SolverRecord, StartRecord, StepRecord

START = "start"  # tables of starts: start.steps, start.draws, start.noised


@dataclass(frozen=True)
class Assembly:
    """A program before it is written.

    Attributes:
        recurrence: the solver inside the graphs; None leaves it to the host.
        program: the loop's graphs and launches.
        prologues: in the order they run in.
        tables: values by step that graphs or the host read.
        launches: the program's, without writes that nobody reads.
        allocation: of slots.
        start: the graph of a first step that is none of the program's; None where no trajectory begins later.
        starts: the sampler's steps from there.
    """

    prepared: Prepared
    subnet: SubNet
    sampler: Sampler
    recurrence: Recurrence | None
    program: Program
    prologues: list[Prologue]
    tables: dict[str, np.ndarray]
    launches: list[Launch]
    allocation: Allocation
    start: Cut | None
    starts: Starts | None

    @property
    def models(self) -> dict[str, ir.Model]:
        """The graphs of loop and prologues by file name."""
        cuts = [*self.program.cuts.values(), *([self.start] if self.start else [])]
        loop = {f"{part.model.graph.name}.onnx": part.model for part in cuts}
        return loop | {part.record.file: part.model for part in self.prologues}

    @cached_property
    def graphs(self) -> dict[str, GraphRecord]:
        return {
            name: _graph_record(part, self.program.signatures[name], self.prepared.denoiser)
            for name, part in self.program.cuts.items()
        }

    @property
    def solver(self) -> SolverRecord:
        solver = self.recurrence
        return SolverRecord(
            kind="graph" if solver else "host",
            history=solver.history if solver else 0,
            result=self.allocation.slot_of[LATENT, self.subnet.calls if solver else 0],
            draws=self.sampler.draws,
        )

    @property
    def steps(self) -> list[StepRecord]:
        return _steps(self.sampler, self.launches, self.allocation)

    @property
    def parts(self) -> list[PartRecord]:
        """Parameters and MACs by binding time."""
        loop = sum(self.graphs[launch.graph].macs for launch in self.launches)
        denoiser = self.prepared.denoiser
        return parts(denoiser.model.graph, denoiser.row_count, loop, self.subnet.calls, denoiser.best)

    def record(self, tables_file: str, subnet_file: str) -> ProgramRecord:
        """Return the program as the bundle's record has it; the files are those of its tables and its SubNet."""
        return ProgramRecord(
            sampler=self.subnet.sampler,
            solver=self.solver,
            prologues=[part.record for part in self.prologues],
            slots=self.allocation.slots,
            steps=self.steps,
            parts=self.parts,
            start=self._start,
            tables_file=tables_file,
            subnet_file=subnet_file,
            macs=self.subnet.cost.subnet,
            budget=self.subnet.cost.ratio,
            naive_cache_bytes=self.naive_cache_bytes,
        )

    @property
    def _start(self) -> StartRecord | None:
        if self.start is None or self.starts is None:
            return None
        denoiser = self.prepared.denoiser
        graph = _graph_record(self.start, "1" * len(denoiser.features), denoiser)
        model = self.prepared.trace.model
        rounds: Literal["down", "up"] = "up" if model.family.seen else "down"
        return StartRecord(graph=graph, order=self.starts.order, rounds=rounds, strengths=usual_strengths(model.folder))

    @property
    def naive_cache_bytes(self) -> int:
        """What the cache would take if the last outputs of every site were kept."""
        features = {name for names in self.prepared.denoiser.features for name in names}
        outputs = [value for value in self.prepared.denoiser.model.graph.outputs if value.name in features]
        largest = values_at(self.prepared.sizes.axes, "max")
        return self.subnet.schedule.history * sum(bytes_of(tensor_record(value), largest) for value in outputs)


def assemble(
    prepared: Prepared, subnet: SubNet, sampler: Sampler, layout: str, starts: Starts | None = None
) -> Assembly:
    """Lay out the launches of a SubNet, cut the graphs, evaluate the tables, allocate the slots.

    With ``starts`` of its sampler, trajectories may begin at later steps.
    """
    traced, denoiser, schedule = prepared.trace, prepared.denoiser, subnet.schedule

    def live_sites(row: np.ndarray, sites: Iterable[int]) -> set[int]:
        return traced.live_sites(row, {*sites, *np.flatnonzero(row)})  # graphs compute what they compute

    plans = plan(schedule.gates, schedule.history, live_sites)
    launched = schedule.launches(traced)
    solver = recurrence(sampler, launched)
    tables = {
        **prepared.tables(sampler.timesteps),
        **_backup_tables(subnet, traced),
        **_solver_tables(sampler, solver, launched),
        **({f"{START}.{name}": getattr(starts, name) for name in ("steps", "draws", "noised")} if starts else {}),
    }
    earlier = prepared.hoisting.read_by("loop")
    loop = Loop(
        denoiser,
        earlier,
        [name for name in earlier if prepared.hoisting.binding[name] == "table"],
        schedule.backups,
        solver.history if solver else 0,
        solver is not None and not np.allclose(sampler.input_scale, 1, atol=1e-9),
    )
    stem, short = stem_of(subnet.model.name) + prepared.variant, Dtype.of_torch(traced.dtype).short
    size = prepared.sizes.text
    work = Work(loop, plans, launched, stem, f"{short}-{size}")
    program = LAYOUTS[layout](work, tables)
    start = _start_graph(work) if starts else None
    cuts = [*program.cuts.values(), *([start] if start else [])]
    prologues = _prologues(prepared, cuts, subnet.calls, f"{stem}-%s-%s-{short}-{subnet.calls}")
    largest = values_at(prepared.sizes.axes, "max")
    launches, allocation = _allocate(program, launched, subnet.calls, solver is not None, largest)
    read = {row.tensor for part in cuts for row in part.rows.values()}
    read |= {row.tensor for part in prologues for row in part.record.rows.values()}
    used = {name: array for name, array in tables.items() if name in read or array.dtype == np.float64}
    return Assembly(prepared, subnet, sampler, solver, program, prologues, used, launches, allocation, start, starts)


def _start_graph(work: Work) -> Cut:
    """Cut the graph of a first step, whichever it is: it computes all, and hands out what any step stores."""
    stored = {site for plan in work.plans for site in plan.stored}
    whole = replace(work, loop=replace(work.loop, history=0, backups={}))
    outputs = [EPSILON, *work.features(stored)]
    return whole.cut(whole.name("start", outputs), range(len(work.loop.denoiser.features)), outputs)


def _backup_tables(subnet: SubNet, traced: Trace) -> dict[str, np.ndarray]:
    """Return the backup weights with the rows of computed steps filled in: the output that was just computed."""
    tables, gates = {}, subnet.gates
    for name, site, _ in backup_outputs(traced):
        if name in subnet.schedule.backups:
            table = subnet.schedule.backups[name].copy()
            table[gates[:, site]] = 0
            table[gates[:, site], 0] = 1
            tables[name] = table
    return tables


def _solver_tables(sampler: Sampler, solver: Recurrence | None, launched: Sequence[int]) -> dict[str, np.ndarray]:
    tables = {f"{SOLVER}.rows": sampler.rows, f"{SOLVER}.input_scale": sampler.input_scale}
    if solver:
        for name, values in (("latents", solver.latents), ("outputs", solver.outputs)):
            table = np.zeros((sampler.calls, solver.history), np.float32)
            table[launched] = values
            tables[f"{SOLVER}.{name}"] = table
        tables[f"{SOLVER}.scale"] = sampler.input_scale.astype(np.float32)
    return tables


def _prologues(prepared: Prepared, cuts: Iterable[Cut], calls: int, name: str) -> list[Prologue]:
    """Cut the prologues that compute what the loop's graphs, and later prologues, read; in the order they run in."""
    read = {tensor.name for part in cuts for tensor in part.inputs}
    prologues: list[Prologue] = []
    kinds: tuple[Literal["steps", "prompt"], ...] = ("steps", "prompt")
    for kind in kinds:
        names = [value for value, binding in prepared.hoisting.binding.items() if binding == kind and value in read]
        part = prepared.prologue(kind, names, calls)
        if part is not None:
            own = name % (kind, sha256_of_json(names)[:8])
            part.model.graph.name = own
            prologues.insert(0, Prologue(part.model, part.record.model_copy(update={"file": f"{own}.onnx"})))
            read |= {tensor.name for tensor in part.record.inputs}
    return prologues


def _allocate(
    program: Program, launched: Sequence[int], calls: int, in_graph: bool, largest: Mapping[str, int]
) -> tuple[list[Launch], Allocation]:
    """Allocate slots for what launches hand on; every ε stays until its step ends, and the result to the end."""
    until: dict[Value, int] = {(EPSILON, launch.step): number for number, launch in enumerate(program.launches)}
    end = len(program.launches)
    until[LATENT, calls if in_graph else 0] = end
    launches = prune(program.launches, until)
    return launches, allocate(launches, _tensors(program), [(LATENT, launched[0] if in_graph else 0)], until, largest)


def _tensors(program: Program) -> dict[str, TensorRecord]:
    """Return what each value that launches hand on is."""
    tensors: dict[str, TensorRecord] = {}
    for part in program.cuts.values():
        for tensor in part.outputs:
            name = LATENT if tensor.name == "next" else tensor.name
            tensors[name] = tensor.model_copy(update={"name": name})
        for tensor in part.inputs:
            if tensor.name in part.reads:
                name = part.reads[tensor.name][0]
                tensors[name] = tensor.model_copy(update={"name": name})
    return tensors


def _steps(sampler: Sampler, launches: Sequence[Launch], allocation: Allocation) -> list[StepRecord]:
    slots = allocation.slot_of
    steps: list[StepRecord] = []
    for step, timestep in enumerate(sampler.timesteps):
        own = [launch for launch in launches if launch.step == step]
        if not own:
            steps.append(steps[-1].model_copy(update={"timestep": timestep, "launches": []}))
            continue
        steps.append(
            StepRecord(
                timestep=timestep,
                launches=[
                    {
                        "graph": launch.graph,
                        "reads": {name: slots[value] for name, value in launch.reads.items()},
                        "writes": {name: slots[value] for name, value in launch.writes.items()},
                    }
                    for launch in own
                ],
                latent=slots.get((LATENT, step), slots.get((LATENT, 0), 0)),
                epsilon=slots[EPSILON, step],
            )
        )
    return steps


def _graph_record(part: Cut, signature: str, denoiser: DenoiserGraph) -> GraphRecord:
    """Describe a graph; MACs are of one row of the denoiser's batch."""
    graph = part.model.graph
    return GraphRecord(
        file=f"{graph.name}.onnx",
        signature=signature,
        macs=sum(node_macs(node, denoiser.best) for node in graph) // denoiser.row_count,
        parameters=sum(weights_read(graph).values()),
        inputs=part.inputs,
        outputs=part.outputs,
        rows=part.rows,
    )
