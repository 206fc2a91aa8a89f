"""What searches find against every fixed schedule, at equal MACs and on held-out noise; run in torch, without engines.

dipgo search digits-dit --steps 20 --budget 0.5,0.35,0.25,0.2 -o build/search
dipgo search digits-dit --steps 20 --budget 0.5,0.35,0.25,0.2 --method paper -o build/paper
python -m benchmarks.studies.search_table build/search --paper build/paper \\
    -o benchmarks/results/search-digits-dit-ddim.json
python -m benchmarks.results    the table into its page of docs/results/

Most of the time goes into fixed schedules. For other SubNets on the same sites they need not be judged again:
``--policies-of`` takes their rows from an earlier table, where one that is judged anew comes out the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from tqdm import tqdm

from benchmarks.bench.quality import psnr
from benchmarks.studies.rivals import rivals
from benchmarks.studies.search_judge import Judge
from benchmarks.studies.search_record import BEST, DIPGO, PAPER, Cell, TableRecord, markdown
from benchmarks.studies.study import Study, Words, run
from dipgo.base.config import problem
from dipgo.base.errors import DipgoError
from dipgo.base.records import read_json
from dipgo.model.models import Model, find_model
from dipgo.model.sampler import is_flow, make_scheduler
from dipgo.schedule.fixed_schedules import fixed_schedules
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.subnet import SubNet, load_subnet
from dipgo.searching import judge as noise
from dipgo.searching.context import drift_of
from dipgo.searching.run_folder import Run
from dipgo.searching.task import Choices, Task, make_task
from export.sources import check_model

PLAIN_ROWS = {f"{name}, inside": name for name in ("uniform reuse", "uniform extrapolation")}
DEEP, DEEP_ROW = "DeepCache", "DeepCache-like, the best"
FIRST = 16  # noises, of their own, on which schedules are seen first
SAME_DB = 0.02  # the mean over images of the same schedule on the same noise, on two machines, differs by less
CLOSE_DB = 3.0  # schedules that far below the best one there might be the best on other noise


def cells(
    judge: Judge, searched: list[SubNet], paper: list[SubNet], earlier: TableRecord | None = None
) -> Iterator[Cell]:
    """Yield all rows of the budgets of ``searched``, fixed schedules on the sites of each.

    With an earlier table the rows of fixed schedules are those that it has.
    """
    for subnet in searched:
        task = judge.on_sites_of(subnet)
        budget = subnet.search.budget or 0.0
        steps = max(2, round(task.sampler.steps * budget))
        ratio = steps / task.sampler.calls
        same = task.with_sampler(make_scheduler(task.sampler.name, task.pipe.scheduler), steps)
        yield judge.cell("fewer steps, same solver", budget, ratio, judge.images_in(same))
        if task.sampler.name != "DPMSolverMultistepScheduler" and not is_flow(task.pipe.scheduler):
            dpm = task.with_sampler(make_scheduler("dpm++2m", task.pipe.scheduler), steps)
            yield judge.cell("fewer steps, DPM-Solver++ 2M", budget, ratio, judge.images_in(dpm))
        if earlier:
            yield from earlier_cells(judge, task, subnet, budget, earlier)
        else:
            yield from fixed_cells(judge, task, subnet, budget)
        if is_flow(task.pipe.scheduler):
            yield from rival_cells(judge, task, budget)
        for one in paper:
            if one.search.budget == budget:
                yield judge.cell(PAPER, budget, one.cost.ratio, judge.images_of(one), what=one.search.chosen)
        yield judge.cell(
            DIPGO,
            budget,
            subnet.cost.ratio,
            judge.images_of(subnet),
            what=subnet.search.chosen,
            search_seconds=subnet.search.seconds,
        )


def fixed_cells(judge: Judge, task: Task, searched: SubNet, budget: float) -> Iterator[Cell]:
    """Yield the rows of fixed schedules: the plain ones, the best DeepCache-like one, and the best of all.

    All are seen first on a few noises of their own; those that are not far behind there (:data:`CLOSE_DB`), or that a
    row names, run on the table's noise. Of the best of all each figure counts for itself, so no choice of one is held
    against it. Where no site makes the output, no step can be skipped whole; so schedules on ``block`` sites count
    too, which the search has not seen.
    """
    by_name: dict[str, Cell] = {}
    blocks = [] if task.trace.output_sites() else [judge.task.with_sites("block")]
    for own, where in [(task, ""), *((block, ", by block") for block in blocks)]:
        fixed = _fixed(own, searched, budget)
        for name in tqdm(_in_question(own, fixed), desc=f"fixed policies{where}, {budget:g}", leave=False):
            by_name[f"{name}{where}"] = _judged(judge, own, fixed, name, budget, where)
    for name, row in PLAIN_ROWS.items():
        if name in by_name:
            yield by_name[name].model_copy(update={"row": row})
    deep = [cell for name, cell in by_name.items() if name.startswith(DEEP)]
    if deep:
        yield _best(deep, DEEP_ROW)
    yield _best(list(by_name.values()), BEST)


def rival_cells(judge: Judge, task: Task, budget: float) -> Iterator[Cell]:
    """Yield the rows in the manner of published caches, each the best of its schedules; see :mod:`~.rivals`."""
    for row, schedules in rivals(task, budget).items():
        yield _best([_judged(judge, task, {row: each}, row, budget) for each in schedules], row)


def earlier_cells(judge: Judge, task: Task, searched: SubNet, budget: float, earlier: TableRecord) -> list[Cell]:
    """Return the rows of fixed schedules that an earlier table has.

    Raises:
        DipgoError: a table without them, or of other noise, prompts or sites: the first schedule in it has other images
            now.
    """
    fixed = _fixed(task, searched, budget)
    known = {row: name for name, row in PLAIN_ROWS.items() if name in fixed}
    rows = {*PLAIN_ROWS.values(), DEEP_ROW, BEST}
    earlier_rows = [cell for cell in earlier.cells if cell.budget == budget and cell.row in rows]
    checked = next((cell for cell in earlier_rows if cell.row in known), None)
    if checked is None or earlier_rows[-1].row != BEST:
        raise DipgoError(f"the earlier table has no fixed policies at {budget:g}; leave out --policies-of")
    then = len(checked.each_psnr_db)
    if then != len(judge.reference):
        raise DipgoError(
            f"the earlier table holds the PSNR of {then} images at {budget:g}, this one is of {len(judge.reference)}; "
            "give the same --images, or leave out --policies-of"
        )
    now = _judged(judge, task, fixed, known[checked.row], budget).image_psnr_db
    if abs(now - checked.image_psnr_db) > SAME_DB:
        raise DipgoError(
            f"at {budget:g} '{checked.row}' has {now:.2f} dB, in the earlier table {checked.image_psnr_db:.2f} dB; "
            "leave out --policies-of"
        )
    return earlier_rows


def _fixed(task: Task, searched: SubNet, budget: float) -> dict[str, Schedule]:
    return fixed_schedules(task.trace.macs, task.sampler.calls, budget, drift_of(task, searched.search.seed))


def _in_question(task: Task, fixed: Mapping[str, Schedule]) -> list[str]:
    """Return the fixed schedules that rows name, and those that might be the best of all."""
    first = noise.Judge(task, FIRST, 6_000_000, Run(), FIRST)
    psnrs = {name: first.psnr(schedule) for name, schedule in fixed.items()}
    least = max(psnrs.values(), default=0.0) - CLOSE_DB
    return [name for name in fixed if name in PLAIN_ROWS or name.startswith(DEEP) or psnrs[name] >= least]


def _judged(judge: Judge, task: Task, fixed: Mapping[str, Schedule], name: str, budget: float, where: str = "") -> Cell:
    subnet = task.subnet(fixed[name], method=name)
    return judge.cell("", budget, subnet.cost.ratio, judge.images_of(subnet), what=f"{name}{where}")


def _best(judged: Sequence[Cell], row: str) -> Cell:
    """Return the cell of the highest PSNR, with the highest of the other figures of PSNR in place of its own."""
    best = max(judged, key=lambda cell: cell.psnr_db)
    close = [cell.converged_db for cell in judged if cell.converged_db is not None]
    mean = max(judged, key=lambda cell: cell.image_psnr_db)
    figures = {
        "image_psnr_db": mean.image_psnr_db,
        "each_psnr_db": mean.each_psnr_db,
        "ssim": max((cell.ssim for cell in judged if cell.ssim is not None), default=None),
        "converged_db": max(close) if close else None,
    }
    return best.model_copy(update={"row": row, **figures})


def check_same(subnets: Sequence[SubNet], model: Model) -> None:
    """Refuse SubNets that one table cannot hold.

    Raises:
        DipgoError: another model than ``model``, another sampler, steps or guidance than the first one's, or budgets of
            measured time, while schedules are taken at equal MACs.
    """
    for subnet in subnets:
        check_model(subnet, model)
        if subnet.search.cost.kind != "macs":
            raise DipgoError("a SubNet whose budget is of latency; a table is at equal MACs, search with --cost macs")
        if subnet.sampler != subnets[0].sampler:
            raise DipgoError(
                f"a SubNet for {_sampler(subnet)} beside one for {_sampler(subnets[0])}; a table is of one sampler, "
                "give folders of the same"
            )


def _sampler(subnet: SubNet) -> str:
    sampler = subnet.sampler
    return f"{sampler.steps} steps of {sampler.class_name} at guidance {sampler.guidance_scale:g}"


def load_folder(folder: Path) -> list[SubNet]:
    """Return the SubNets in a folder, the largest budget first."""
    subnets = [load_subnet(path) for path in sorted(folder.glob("*.json")) if path.stem[:1].isdigit()]
    if not subnets:
        raise DipgoError(f"{folder}: no SubNet in it; write some with dipgo search --budget 0.5,0.25 -o {folder}")
    return sorted(subnets, key=lambda subnet: -(subnet.search.budget or 0.0))


def read_table(path: Path) -> TableRecord:
    """Read a result file.

    Raises:
        DipgoError: no file, or none of these.
    """
    try:
        return TableRecord.model_validate(read_json(path, "table of searches"))
    except ValidationError as error:
        raise DipgoError(f"{path}: not a table of searches ({problem(error, TableRecord)})") from error


def main(words: Words | None = None) -> None:
    study = Study("search_table", __doc__, words)
    study.parser.add_argument("searched", type=Path, help="folder with one SubNet a budget")
    study.parser.add_argument("--paper", type=Path, help="the same, by the paper's method")
    study.parser.add_argument("--prompts", type=Path, help="what to judge on, one a line, where prompts condition")
    study.parser.add_argument("--policies-of", type=Path, metavar="FILE", help="an earlier table with these schedules")
    study.parser.add_argument("--images", type=int, default=256)
    study.parser.add_argument("--converged", type=int, default=64, help="images of the 500-step trajectory; 0 for none")
    options = study.options()
    earlier = options.policies_of and read_table(options.policies_of)
    searched = load_folder(options.searched)
    paper = load_folder(options.paper) if options.paper else []
    first = searched[0]
    model = find_model(first.model.name, pixels=first.sampler.pixels)
    check_same([*searched, *paper], model)
    sampler, sites = first.sampler, ",".join(site.name for site in first.sites)
    choices = Choices(options.prompts)
    task = make_task(model, sampler.steps, sampler.class_name, sites, sampler.guidance, choices=choices)
    judge = Judge(task, options.images, options.converged)
    table = []
    for cell in cells(judge, searched, paper, earlier):
        table.append(cell)
        print(f"{cell.budget:g}  {cell.row}: {cell.psnr_db:.2f} dB  {cell.what}", flush=True)
    converged = judge.converged
    record = TableRecord(
        model=first.model,
        sampler=sampler,
        images=len(judge.reference),
        converged_images=0 if converged is None else len(converged),
        prompts=len(set(task.sampling.choices)) if task.model.family.conditioned_by == "prompt" else 0,
        full_class_accuracy=judge.accuracy(judge.reference),
        full_converged_db=None if converged is None else psnr(judge.reference[: len(converged)], converged),
        cells=table,
        **study.origin(),
    )
    study.write(record)
    print(markdown(record, str(options.output)))


if __name__ == "__main__":
    run(main)
