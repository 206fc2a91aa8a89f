"""Bundles on the Hugging Face hub: downloaded by their id, and pushed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dipgo.base.errors import DipgoError, not_imported, one_line
from dipgo.base.files import new_folder
from export.bundle import BUNDLE, RECORD_FILE, Bundle


def found(place: str | Path) -> Path:
    """Return the folder of a bundle: the place itself, or where the hub's repository of this id was downloaded to.

    Raises:
        DipgoError: what the hub says, or a repository that is no bundle.
    """
    path, name = Path(place), str(place)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        return path
    hub = _hub()
    try:
        hub.hf_hub_download(name, RECORD_FILE)  # first what says that it is a bundle
        snapshot = Path(hub.snapshot_download(name))
    except hub.errors.RemoteEntryNotFoundError as error:
        raise DipgoError(
            f"'{name}' on the hub is no bundle: it has no {RECORD_FILE}; give one that 'dipgo push' made"
        ) from error
    except Exception as error:  # each reason has a class of its own
        raise DipgoError(f"{name}: no such folder, and the hub says: {one_line(error)}") from error
    return _without_links(snapshot)


def push(bundle: Bundle, name: str, card: str, private: bool = False) -> str:
    """Upload a bundle's files, engines left out, and a model card; returns the address of the repository.

    Raises:
        DipgoError: what the hub says, such as that one is not logged in.
    """
    hub = _hub()
    try:
        api = hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=name)
        api.upload_folder(repo_id=name, folder_path=bundle.folder, allow_patterns=[*bundle.record.files, RECORD_FILE])
    except Exception as error:
        raise DipgoError(f"{name}: the hub says: {one_line(error)}; log in with 'hf auth login'") from error
    return str(address)


def _without_links(snapshot: Path) -> Path:
    """Copy a snapshot of the hub's cache, which is links to its blobs: a bundle has none. Made once per revision."""
    folder = snapshot.parents[1] / "bundles" / snapshot.name
    if not folder.is_dir():
        with new_folder(folder, True, BUNDLE) as draft:
            for file in (path for path in snapshot.rglob("*") if path.is_file()):
                target = draft / file.relative_to(snapshot)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    return folder


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise not_imported("huggingface_hub", error, "run: pip install huggingface_hub") from error
    return huggingface_hub
