"""Where a search writes its SubNets: one file, or for several budgets a folder of them with a Pareto plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dipgo.base.errors import UsageError
from dipgo.base.files import refuse_existing, refuse_to_fill
from dipgo.base.records import read_json
from dipgo.schedule.subnet import SubNet, save_subnet, weights_file
from dipgo.searching.config import SearchConfig
from dipgo.searching.run_folder import begun_with


@dataclass(frozen=True)
class Outputs:
    """The files of a search at ``path``; ``force`` replaces what is there."""

    path: Path
    config: SearchConfig
    force: bool = False

    def file(self, budget: float) -> Path:
        """Return where the SubNet of a budget goes."""
        return self.path / f"{budget:g}.json" if self.config.several else self.path

    def save(self, subnet: SubNet) -> Path:
        """Write a SubNet that was found; returns its file."""
        file = self.file(subnet.search.budget or self.config.budget[0])
        save_subnet(subnet, file, self.force or self.config.resume)
        return file

    def check(self) -> None:
        """Refuse an output that exists or cannot be written; what a sweep that is resumed has written is written again.

        Raises:
            UsageError: it exists, without ``force``, or it is a file where a folder is to be, or the reverse.
        """
        path, several = self.path, self.config.several
        if path.exists() and path.is_dir() != several:
            is_now, needed = ("a file", "a folder") if several else ("a folder", "a JSON file")
            budgets = "several budgets" if several else "one budget"
            raise UsageError(f"{path}: is {is_now}; give {needed} for {budgets}")
        folder = self.config.run_folder
        resumed = bool(self.config.resume and folder and begun_with(folder, "settings"))
        if not several:
            refuse_existing(path, self.force)
            refuse_existing(weights_file(path), self.force or resumed)  # without its JSON a kill may have left it
            return
        refuse_to_fill(path, self.force or resumed)
        for budget in self.config.budget:
            file = self.file(budget)
            if not self.force and file.exists() and not self._is_ours(file, budget):
                raise UsageError(f"{file}: is of another search; give another path, or --force to replace it")

    def _is_ours(self, file: Path, budget: float) -> bool:
        """Whether a SubNet is what this search writes for a budget."""
        record = read_json(file, "SubNet")
        search = record.get("search") if isinstance(record, dict) else None
        if not isinstance(search, dict) or not isinstance(search.get("settings"), dict):
            return False
        own = {"method": self.config.method, "budget": budget, "seed": self.config.seed, **self.config.deciding()}
        theirs = search["settings"] | search
        return bool(json.loads(json.dumps(own)) == {name: theirs.get(name) for name in own})
