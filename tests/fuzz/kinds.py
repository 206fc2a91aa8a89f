"""The kinds of files that are mutated: seeds, made by code, how a mutant is made, and what is done with it."""

from __future__ import annotations

import collections
import io
import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors.numpy import save

from dipgo.base.files import sha256_of
from dipgo.base.inputs import read_tensors
from dipgo.base.safetensors_index import read_file, read_pieces
from dipgo.cli.recipe_file import FOLDER as RECIPES
from dipgo.cli.recipe_file import read_recipe, shipped
from dipgo.importers.importer import apply, read_schedule
from dipgo.model.prompts import read_prompts
from dipgo.model.sampler import make_scheduler, tabulate
from dipgo.schedule.describe import subnet_text
from dipgo.schedule.subnet import load_subnet, save_subnet
from engines.pipeline.pipeline import load
from export.axes import shape_at, values_at
from export.bundle import open_bundle
from export.compiler import write_bundle
from export.describe import bundle_text
from export.sources import check_model, sampler_of
from tests import zoo
from tests.fuzz import mutations
from tests.models import random_subnet

STEPS = 4


class Kind(Protocol):
    def make(self, seed: int | None, folder: Path) -> Path:
        """Write a mutant into a folder and return its path; the first seed as it is where ``seed`` is None."""

    def use(self, path: Path, output: Path) -> None:
        """Do with it what users do; ``output`` is for what comes of it."""


@dataclass(frozen=True)
class Bundles:
    """Bundles of a class, a prompt and nothing; with ranges and without."""

    seeds: Sequence[Path]

    def make(self, seed: int | None, folder: Path) -> Path:
        rng = Random(f"bundle {seed}")
        bundle = folder / "bundle"
        shutil.copytree(self.seeds[0] if seed is None else rng.choice(self.seeds), bundle)
        if seed is None:
            return bundle
        for _ in range(rng.choice([1, 1, 2])):
            names = ["bundle.json"] * 8 + ["tables.safetensors"] * 3 + sorted(path.name for path in bundle.iterdir())
            path = bundle / rng.choice(names)
            if rng.random() < 0.05:
                graphs = [path for path in sorted(bundle.glob("*.onnx")) if _is_small(path)]
                first, second = rng.choice(graphs).read_bytes(), rng.choice(graphs)
                path = rng.choice(graphs)
                path.write_bytes(second.read_bytes())
                second.write_bytes(first)
            elif _is_small(path):
                mutations.change_file(rng, path)
        if rng.random() < 0.75:
            mutations.reseal(bundle)
        return bundle

    def use(self, path: Path, output: Path) -> None:
        bundle = open_bundle(path)
        bundle_text(bundle)
        subnet_text(load_subnet(path / bundle.record.subnet_file))
        with load(path) as program:
            record = program.record
            count = shape_at(record.latent.shape, values_at(record.axes, "min"))[0]
            noise = program.noise(count, 0)
            if record.conditioning.encoder or record.conditioning.kind != "prompt":
                conditions = program.conditions(["a red fox" if record.conditioning.encoder else 1] * count)
            else:
                sizes = values_at(record.axes, "opt") | program.axes_of(noise.shape)
                inputs = record.conditioning.inputs
                conditions = {each.name: np.ones(shape_at(each.shape, sizes), each.dtype) for each in inputs}
            latent = program.denoise(noise, conditions)
            if record.decoder or program.makes_pixels:
                program.decode(latent)


def _is_small(path: Path) -> bool:
    """Whether a file is one, and no mutation before has made it larger than can be read."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size < 2**28


@dataclass(frozen=True)
class SubNets:
    """SubNets of a small model; those that are read are compiled and run."""

    seeds: Sequence[Path]
    task: Any
    prepared: Any

    def make(self, seed: int | None, folder: Path) -> Path:
        rng = Random(f"subnet {seed}")
        for file in (self.seeds[0] if seed is None else rng.choice(self.seeds)).iterdir():
            shutil.copy(file, folder)
        path, weights = folder / "s.json", folder / "s.safetensors"
        if seed is None:
            return path
        for _ in range(rng.choice([1, 1, 2])):
            target = rng.choice([path, weights if weights.exists() else path])
            if target.is_file() and not target.is_symlink() and target.stat().st_size < 2**28:
                mutations.change_file(rng, target)
        if rng.random() < 0.75:
            self._reseal(path, weights)
        return path

    def _reseal(self, path: Path, weights: Path) -> None:
        try:
            document = json.loads(path.read_text()) if path.is_file() and path.stat().st_size < 2**24 else {}
            if document.get("backup") and weights.is_file() and weights.stat().st_size < 2**28:
                document["backup"]["sha256"] = sha256_of(weights)
                path.write_text(json.dumps(document))
        except (ValueError, TypeError, AttributeError, RecursionError, OSError):
            return

    def use(self, path: Path, output: Path) -> None:
        subnet = load_subnet(path)
        subnet_text(subnet)
        model = self.task.trace.model
        check_model(subnet, model)
        write_bundle(self.prepared, subnet, sampler_of(subnet, model), output / "bundle")
        with load(output / "bundle") as program:
            program.denoise(program.noise(1, 0), program.conditions([1]))


@dataclass(frozen=True)
class Schedules:
    """Published schedules: JSON, or pickles of gates; those that are read become SubNets."""

    seeds: Sequence[bytes]
    traces: Sequence[Any]
    suffix: str

    def make(self, seed: int | None, folder: Path) -> Path:
        rng = Random(f"schedule {seed}")
        path = folder / f"schedule{self.suffix}"
        path.write_bytes(self.seeds[0] if seed is None else rng.choice(self.seeds))
        for _ in range(0 if seed is None else rng.choice([1, 1, 2, 4])):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**28:
                if self.suffix == ".pkl" and rng.random() < 0.4:
                    path.write_bytes(_with_opcodes(rng, path.read_bytes()))
                else:
                    mutations.change_file(rng, path)
        return path

    def use(self, path: Path, output: Path) -> None:
        published = read_schedule(path)
        for traced in self.traces:
            table = tabulate(
                make_scheduler("ddim", DDIMScheduler(clip_sample=False)), min(published.steps or STEPS, 1000)
            )
            try:
                subnet = apply(published, traced, table, file=path.name)
            except ValueError:  # which the caller makes a line of, with the path
                continue
            save_subnet(subnet, output / "s.json", force=True)
            load_subnet(output / "s.json")


@dataclass(frozen=True)
class Tensors:
    """Safetensors files, read by their headers and as backup weights."""

    seeds: Sequence[bytes]

    def make(self, seed: int | None, folder: Path) -> Path:
        rng = Random(f"tensors {seed}")
        path = folder / "t.safetensors"
        path.write_bytes(self.seeds[0] if seed is None else rng.choice(self.seeds))
        if seed is not None:
            mutations.change_file(rng, path)
        return path

    def use(self, path: Path, output: Path) -> None:
        try:
            stored = read_file(path)
        finally:
            read_tensors(path, "weights", "save them again")
        for tensor in stored.values():
            collections.deque(read_pieces(tensor), 0)


@dataclass(frozen=True)
class Recipes:
    """Recipes and files of prompts."""

    seeds: Sequence[bytes]

    def make(self, seed: int | None, folder: Path) -> Path:
        rng = Random(f"recipe {seed}")
        path = folder / "recipe.yaml"
        path.write_bytes(self.seeds[0] if seed is None else rng.choice(self.seeds))
        if seed is None:
            return path
        if rng.random() < 0.3:
            text = rng.choice(["&a [*a]", "{a: &a [1], b: [*a, *a]}", "2024-13-45", "!!python/name:os.system", "? [1]"])
            path.write_bytes(path.read_bytes() + f"\nabout: {text}\n".encode())
        else:
            mutations.change_file(rng, path)
        return path

    def use(self, path: Path, output: Path) -> None:
        try:
            read_recipe(path)
        finally:
            read_prompts(path)


def _with_opcodes(rng: Random, data: bytes) -> bytes:
    """Put a few opcodes that are known to the reader into a pickle."""
    pieces = [
        b"]",
        b"}",
        b")",
        b"N",
        b"(",
        b"t",
        b"e",
        b"a",
        b"s",
        b"u",
        b"R",
        b"Q",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x94",
    ]
    pieces += (
        [b"q" + bytes([k]) for k in range(4)] + [b"h" + bytes([k]) for k in range(4)] + [b"K\1", b"J\xff\xff\xff\x7f"]
    )
    at = rng.randrange(len(data) + 1)
    return data[:at] + b"".join(rng.choices(pieces, k=rng.choice([1, 2, 5, 50]))) + data[at:]


def gates_pickle(gates: Sequence[Sequence[int]]) -> bytes:
    """Return gates as the public code writes them."""
    keys = [("down", "block", 0, 0), ("down", "block", 1, 0), ("mid", "mid_block", 0, 0), ("up", "block", 0, 0)]
    rows = [{key: torch.eye(2)[gate].clone() for key, gate in zip(keys, row, strict=True)} for row in gates]
    stream = io.BytesIO()
    pickle.Pickler(stream, 4).dump(rows)
    return stream.getvalue()


def make_kinds(folder: Path) -> dict[str, Kind]:
    """Make the seeds, and return the kinds by name; ``folder`` is for what they need."""
    task = zoo.task("dit", STEPS)
    dit, sd = task.trace, zoo.trace("sd")
    subnets = []
    for number, (terms, channels) in enumerate([(1, None), (2, 1), (2, 2), (2, 0)]):
        subnets.append(folder / f"subnet-{number}")
        subnets[-1].mkdir(parents=True)
        save_subnet(random_subnet(dit, task.sampler, number, 0.6, terms, channels), subnets[-1] / "s.json")
    unconditional = zoo.trace("unconditional")
    bundles = [zoo.bundle(dit, task.sampler, load_subnet(path / "s.json")) for path in subnets[1:3]]
    for traced, options in (
        (sd, {"batch": "1:2", "size": "16:32"}),
        (unconditional, {"layout": "step"}),
    ):
        kind = "sd" if traced is sd else "unconditional"
        table = zoo.sampler(kind, STEPS)
        bundles.append(zoo.bundle(traced, table, random_subnet(traced, table, 0, 0.6, 2, 1), **options))
    schedules = [
        [1, 0, 1, 0],
        {"attn1": [1, 0, 1, 1], "ff": [1, 1, 0, 1], "ff-1": [1, 0, 0, 1]},
        {"cache_interval": 2, "cache_branch_id": 0},
        {"cache_interval": 2, "cache_layer_id": 0, "cache_block_id": 0, "uniform": False, "pow": 1.4, "center": 2},
        {"block_order": ["down/block/0/0", "mid/mid_block/0/0", "up/block/0/0"], "keep": [[1, 1, 1], [0, 1, 1]]},
    ]
    rng = np.random.default_rng(0)
    tensors = {
        f"t{k}": rng.normal(size=shape).astype(kind) for k, (shape, kind) in enumerate([((3, 2), "f4"), ((), "f8")])
    }
    return {
        "bundle": Bundles(bundles),
        "subnet": SubNets(subnets, task, zoo.converted(dit)),
        "schedule": Schedules([json.dumps(each).encode() for each in schedules], [dit, sd], ".json"),
        "pickle": Schedules([gates_pickle([[1] * 4, [0, 1, 0, 1], [1, 0, 0, 1]])], [sd], ".pkl"),
        "safetensors": Tensors([save(tensors)]),
        "recipe": Recipes([(RECIPES / f"{name}.yaml").read_bytes() for name in shipped()] + [b"a red fox\nblue\n"]),
    }
