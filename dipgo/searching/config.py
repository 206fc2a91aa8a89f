"""Every option of a search, once: the command line, recipes, the Python API and records take them from here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from dipgo.base.config import Config, Names, Numbers, Seed, Text, Threads
from dipgo.base.guidance import scales_of
from dipgo.searching.loss_terms import LOSS_TERMS, is_loss

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"pool": 128, "held_out": 16, "drops": 0},
        **{"contenders": 1, "trial_iterations": 0, "backup_iterations": 52},
    },
    # On SD-1.5 36 GB by calculation, or 15 with batch=1; without recomputation one image takes 165.
    "gpu": {"device": "auto", "precision": "bf16", "recompute": True, "batch": 4, "chunk": 8},
}
METHODS: dict[str, dict[str, Any]] = {"dipgo": {}, "paper": {"batch": 1, "loss": "ssim"}}
"""Where a method needs other values; what is the paper's alone has its values as defaults (section 4.1)."""


def _is_guidance(text: str) -> str:
    scales_of(text)
    return text


def _are_step_weights(weights: tuple[float, ...]) -> tuple[float, ...]:
    if weights and (min(weights) < 0 or sum(weights) <= 0):
        raise ValueError("give one number >= 0 a call, not all of them 0")
    return weights


def _are_budgets(budgets: tuple[float, ...]) -> tuple[float, ...]:
    if not budgets:
        raise ValueError("give a number, or several joined by commas, such as 0.5,0.35")
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ValueError(
                f"budget {budget:g} is outside (0, 1]; give the share of the full trajectory's MACs to keep"
            )
    if len({f"{budget:g}" for budget in budgets}) < len(budgets):  # files and checkpoints are named by six digits
        raise ValueError("names one twice in its first six digits; give each once")
    return budgets


class TaskConfig(Config):
    """What the gates are for, beside the model and the number of steps."""

    sampler: str | None = Field(
        None,
        description="ddim, ddpm, dpm++2m, dpm++2m-sde, euler, euler-a, heun, lcm, pndm, unipc or a diffusers class; "
        "the model's own by default.",
    )
    sites: Names | None = Field(
        None,
        description="block, branch or layer, or module patterns joined by commas; the family's own by default.",
    )
    guidance: Annotated[Text, AfterValidator(_is_guidance)] | None = Field(
        None,
        description="Guidance scale, or a range such as 5:9 for which backups are learned; the pipeline's by default.",
    )
    size: str | None = Field(
        None,
        description="Of images in pixels, SIZE or HEIGHTxWIDTH, where the pipeline's timesteps depend on it (FLUX and "
        "other flow matching); the pipeline's by default.",
    )
    guidance_rescale: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How far guided outputs get the deviation of the conditional ones; with --guidance.",
    )


class Settings(Config):
    """How long and with what to search: what ``--set NAME=VALUE`` changes on the command line."""

    batch: int = Field(8, ge=1, description="Images an iteration, in each process.")
    pool: int = Field(
        1024,
        ge=0,
        description="Noises whose full trajectories are kept for the phases that use them more than once; 0 draws "
        "fresh noise at every iteration.",
    )
    chunk: int = Field(
        32,
        ge=1,
        description="Images computed at once where nothing is learned: full trajectories, and what is judged.",
    )
    held_out: int = Field(32, ge=1, description="Noises on which candidates are compared; never used for learning.")
    drops: int = Field(
        48,
        ge=0,
        description="Gates whose loss is measured, for each spacing, to choose what goes from schedules that cost too "
        "much; 0 leaves this out.",
    )
    drops_on: int = Field(
        8,
        ge=1,
        description="Noises on which drops are measured, and where between reuse and extrapolation backups start.",
    )
    contenders: int = Field(
        6,
        ge=1,
        description="Different gates that are given learned backups for a while. While there are more than three, the "
        "better half learns on for twice as long; then the best learns on.",
    )
    trial_iterations: int = Field(
        8, ge=0, description="Of each contender at first, in whole trajectories: divided by the budget."
    )
    backup_iterations: int = Field(
        200, ge=0, description="Of the best in all, in whole trajectories: at a budget of 0.25 four times as many."
    )
    backup_rate: float = Field(
        1.25e-3,
        ge=0,
        description="Learning rate of backups for a whole trajectory; divided by the budget squared, which below 0.2 "
        "counts as 0.2: the closer gates are to the full trajectory, the lower is the best.",
    )
    backup_schedule: Literal["cosine", "constant"] = Field("cosine", description="Of the learning rate of backups.")
    backup_warmup: int = Field(
        8,
        ge=0,
        description="Iterations. Without it Adam's first steps are as long as any and as noisy as one batch, which "
        "spoils what starts well and misleads trials.",
    )
    history: int = Field(2, ge=1, description="K: computed outputs that a backup combines.")
    by_channel: bool = Field(True, description="One backup weight a channel instead of one a site.")
    by_pass: bool = Field(
        True,
        description="Backup weights of their own for the conditional and the unconditional pass instead of the same.",
    )
    accumulate: int = Field(1, ge=1, description="Batches that make one update.")
    loss: Annotated[str, AfterValidator(is_loss)] = Field(
        "psnr", description=f"A sum of {', '.join(LOSS_TERMS)}, such as 0.5*ssim+latent."
    )
    step_weights: Annotated[Numbers, AfterValidator(_are_step_weights)] = Field(
        (), description="Of the latent term, one number a call; none takes the final latent alone."
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="Of the denoiser.")
    recompute: bool = Field(False, description="Keep no activations between steps: less memory, a third more time.")
    checkpoint_iterations: int = Field(
        0, ge=0, description="A run folder gets a checkpoint every so many iterations; 0 is never."
    )
    checkpoint_seconds: float = Field(60.0, ge=0, description="And after so many seconds; 0 is never.")
    gate_iterations: int = Field(1000, ge=0, description="The paper's method: iterations.")
    gate_rate: float = Field(0.1, ge=0, description="The paper's method: learning rate.")
    gate_schedule: Literal["cosine", "constant"] = Field("cosine", description="The paper's method: of its rate.")
    optimiser: Literal["adam", "sgd"] = Field("sgd", description="The paper's method: sgd has no momentum.")
    warmup: int = Field(0, ge=0, description="The paper's method: iterations over which the rate first rises.")
    weight_decay: float = Field(1e-4, ge=0, description="The paper's method: added to the gradient, L2.")
    clip: float = Field(
        1.0, ge=0, description="The paper's method: highest norm of the gradient, as in the public code; 0 is none."
    )
    width: int = Field(512, ge=1, description="The paper's pruner: D, the width of its queries.")
    layers: int = Field(1, ge=0, description="The paper's pruner: layers of its encoder.")
    heads: int = Field(1, ge=1, description="The paper's pruner: heads of the attention, which divide the width.")
    hidden: int = Field(128, ge=1, description="The paper's pruner: width of its feed-forward layers and heads.")
    attention: Literal["step", "site", "both"] = Field(
        "step", description="The paper's pruner: within a step, over the steps of a site, or both in turn."
    )
    alpha: float = Field(1.0, description="The paper's method: weight of the sparsity loss.")
    tau: float = Field(
        0.2, description="The paper's method: share of MACs at which sparsity ends; the least budget at most."
    )
    gamma: bool = Field(True, description="The paper's method: weight gates by the share of MACs that goes with them.")
    postprocess: Literal["bisection", "sweep"] = Field(
        "bisection", description="From the paper's scores to gates: its Algorithm 1, or the public code's sweep."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Settings:
        if self.width % self.heads:
            raise ValueError(f"pruner of width {self.width}, {self.heads} heads: heads must divide the width")
        return self


class SearchConfig(TaskConfig, Settings):
    """The options of a search on a model.

    ``preset`` and ``method`` change the defaults of the settings; what is given itself goes before both.
    """

    SETTINGS: ClassVar[frozenset[str]] = frozenset(Settings.model_fields)
    """On the command line these go through ``--set``."""
    OTHER_DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {
        **{f"--preset {name}": values for name, values in PRESETS.items()},
        **{f"--method {name}": values for name, values in METHODS.items()},
    }
    """Of settings, by the option that changes them."""
    RECORDED_AS_FOUND: ClassVar[frozenset[str]] = frozenset(
        {*TaskConfig.model_fields, "steps", "budget", "cost", "method", "seed", "prompts", "classes", "start"}
    )
    """Records hold what these come to: the sampler's configuration, the profile of a machine, digests of files."""
    CIRCUMSTANCES: ClassVar[frozenset[str]] = frozenset(
        {"preset", "device", "threads", "run_folder", "resume", "tensorboard"}
        | {"checkpoint_iterations", "checkpoint_seconds"}
    )
    """On these no result depends; a resumed run may have others."""

    steps: int = Field(ge=2, description="Inference steps of the full trajectory.")
    budget: Annotated[Numbers, AfterValidator(_are_budgets)] = Field(
        description="Share of the full trajectory's MACs to keep, in (0, 1]; several joined by commas, such as "
        "0.5,0.35,0.25, each start from the last."
    )
    cost: str = Field(
        "macs",
        description="What the budget is a share of: macs, latency (measured here), or the file of a SubNet that was "
        "searched by latency, for the one measured there.",
    )
    method: Literal["dipgo", "paper"] = Field("dipgo", description="dipgo, or paper for the published procedure.")
    preset: Literal["default", "quick", "gpu"] = Field(
        "default", description="default, quick for a first look, or gpu for a large model on one GPU."
    )
    prompts: Path | None = Field(
        None, description="Prompts to search on, one a line, UTF-8, where prompts condition the model."
    )
    classes: Names | None = Field(
        None, description="Classes to search on, joined by commas, or all, where classes condition the model."
    )
    start: tuple[Path, ...] = Field(
        (), description="SubNet to begin with, besides the fixed schedules: an imported or a found one; repeatable."
    )
    device: str = Field("cpu", description="Where to search: cpu, cuda, cuda:N, or auto for a GPU where torch has one.")
    seed: Seed = 0
    threads: Threads = None
    run_folder: Path | None = Field(
        None, description="Keep checkpoints and figures of the search in this folder; see --resume."
    )
    resume: bool = Field(False, description="Go on with the search in --run-folder.")
    tensorboard: bool = Field(False, description="Log for TensorBoard too, in --run-folder.")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = PRESETS.get(str(values.get("preset", "default")), {})
        return preset | METHODS.get(str(values.get("method", "dipgo")), {}) | values

    @model_validator(mode="after")
    def _run_folder_is_there(self) -> SearchConfig:
        if (self.resume or self.tensorboard) and self.run_folder is None:
            raise ValueError("--resume and --tensorboard need --run-folder")
        return self

    @property
    def several(self) -> bool:
        return len(self.budget) > 1

    def deciding(self) -> dict[str, Any]:
        """Return the options that the result depends on, but for those that are recorded as what they come to."""
        return self.model_dump(mode="json", exclude=set(self.RECORDED_AS_FOUND | self.CIRCUMSTANCES))
