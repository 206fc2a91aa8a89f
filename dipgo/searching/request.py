"""A search as it is asked for on the command line: what on, what for, how, and where the result goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from dipgo.base.errors import UsageError
from dipgo.base.files import refuse_existing, refuse_to_fill
from dipgo.base.records import read_json
from dipgo.graph.latency import LatencyProfile, check_profile, read_profile
from dipgo.model.models import find_model
from dipgo.schedule.subnet import SubNet, load_subnet, save_subnet, weights_file
from dipgo.searching.distributed import processes
from dipgo.searching.journal import Report
from dipgo.searching.pareto import write_pareto
from dipgo.searching.run_folder import begun_with
from dipgo.searching.search import sweep
from dipgo.searching.settings import Settings, settings_of
from dipgo.searching.task import Task, make_task


@dataclass(frozen=True)
class Request:
    """The options of ``dipgo search``, as they are given there.

    Attributes:
        budget: one number, or several joined by commas.
        settings: overrides as ``NAME=VALUE``.
        output: the SubNet's JSON file; with several budgets a folder.
        cost: what budgets are a share of: ``macs``, ``latency`` as measured here and now, or the file of a latency
            profile or of a SubNet that was searched with one.
        start: files of SubNets to begin with.
    """

    model: str
    steps: int
    budget: str | float
    output: Path
    sampler: str | None = None
    sites: str | None = None
    guidance: float | None = None
    cost: str = "macs"
    method: str = "dipgo"
    preset: str = "default"
    settings: Sequence[str] | None = None
    prompts: Path | None = None
    classes: str | None = None
    start: Sequence[Path] | None = None
    device: str = "cpu"
    seed: int = 0
    threads: int | None = None
    run_folder: Path | None = None
    resume: bool = False
    tensorboard: bool = False
    random_weights: bool = False
    force: bool = False


def carry_out(
    request: Request,
    busy: Callable[[str], AbstractContextManager[None]],
    phases: Callable[[], AbstractContextManager[Report]],
    measure: Callable[[Task, int | None], LatencyProfile],
) -> list[tuple[Path, SubNet]]:
    """Search as requested and write what was found.

    Args:
        busy: shows that work of a name goes on.
        phases: yields what shows the progress of phases.
        measure: measures a latency profile on a number of threads.

    Returns:
        The SubNets and their files, one a budget; nothing in other processes than the main one.

    Raises:
        UsageError, DipgoError: in one line, before or during the search. No SubNet is half written, and those of a
            sweep that were found before stay.
    """
    import torch

    budgets = budgets_of(str(request.budget))
    settings = settings_of(request.method, request.preset, request.settings or ())
    refuse_output(request, budgets, settings)
    if (request.resume or request.tensorboard) and request.run_folder is None:
        raise UsageError("--resume and --tensorboard need --run-folder")
    if request.steps < 2:
        raise UsageError(f"steps = {request.steps}: with one step there is nothing to reuse; give at least 2")
    profile = None if request.cost in ("macs", "latency") else read_profile(Path(request.cost))
    starts = [load_subnet(file) for file in request.start or ()]
    model = find_model(request.model, request.random_weights)
    with busy("load and trace"):
        if request.threads:
            torch.set_num_threads(request.threads)
        task = make_task(
            model,
            request.steps,
            request.sampler,
            request.sites,
            request.guidance,
            device=request.device,
            prompts=request.prompts,
            classes=request.classes,
        )
    group = processes(task.trajectory.device)
    if request.cost == "latency":
        with busy("measure latency"):
            profile = group.from_main(lambda: _begun_with(request) or measure(task, request.threads))
    written: list[tuple[Path, SubNet]] = []
    with phases() as report:
        for subnet in sweep(
            task,
            budgets,
            request.method,
            settings,
            request.seed,
            report,
            request.run_folder,
            request.resume,
            request.tensorboard,
            profile,
            starts,
        ):
            if group.main:
                file = file_of(request, budgets, float(subnet.search["budget"]))
                save_subnet(subnet, file, request.force or request.resume)
                written.append((file, subnet))
    if written and len(budgets) > 1:
        write_pareto([subnet for _, subnet in written], request.output)
    return written


def refuse_output(request: Request, budgets: Sequence[float], settings: Settings) -> None:
    """Refuse an output that exists or cannot be written; what the sweep that is resumed has written is written again.

    Raises:
        UsageError: it exists, without ``force``, or it is a file where a folder is to be, or the reverse.
    """
    output, several = request.output, len(budgets) > 1
    if output.exists() and output.is_dir() != several:
        is_now, wanted = ("a file", "a folder") if several else ("a folder", "a JSON file")
        raise UsageError(f"{output}: is {is_now}; give {wanted} for {'several budgets' if several else 'one budget'}")
    resumed = bool(request.resume and request.run_folder and begun_with(request.run_folder, "settings"))
    if not several:
        refuse_existing(output, request.force)
        refuse_existing(weights_file(output), request.force or resumed)  # without its JSON a kill may have left it
        return
    refuse_to_fill(output, request.force or resumed)
    for budget in budgets:
        file = file_of(request, budgets, budget)
        if not request.force and file.exists() and not _is_of(file, request, budget, settings):
            raise UsageError(f"{file}: is of another search; give another path, or --force to replace it")


def _is_of(file: Path, request: Request, budget: float, settings: Settings) -> bool:
    """Whether a SubNet is what the requested search writes for a budget."""
    record = read_json(file, "SubNet")
    search = record.get("search") if isinstance(record, dict) else None
    if not isinstance(search, dict) or not isinstance(search.get("settings"), dict):
        return False
    asked = {"method": request.method, "budget": budget, "seed": request.seed, **settings.deciding()}
    noted = search["settings"] | search
    return json.loads(json.dumps(asked)) == {name: noted.get(name) for name in asked}


def file_of(request: Request, budgets: Sequence[float], budget: float) -> Path:
    """Return where the SubNet of a budget goes."""
    return request.output if len(budgets) == 1 else request.output / f"{budget:g}.json"


def _begun_with(request: Request) -> LatencyProfile | None:
    """Return the profile that the run to be resumed was begun with: measured again, it would not be the same."""
    begun = begun_with(request.run_folder, "profile") if request.resume and request.run_folder else None
    return check_profile(begun, request.run_folder / "run.json") if begun and request.run_folder else None


def budgets_of(text: str) -> list[float]:
    """Return the budgets in ``0.5,0.35``.

    Raises:
        UsageError: something that is no number in (0, 1], or the same budget twice.
    """
    try:
        budgets = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"budget '{text}': give a number, or several joined by commas, such as 0.5,0.35") from error
    for budget in budgets:
        if not 0 < budget <= 1:
            raise UsageError(
                f"budget {budget:g} is outside (0, 1]; give the share of the full trajectory's MACs to keep"
            )
    if len({f"{budget:g}" for budget in budgets}) < len(budgets):  # files and checkpoints are named by six digits
        raise UsageError(f"budget '{text}' names one twice in its first six digits; give each once")
    return budgets
