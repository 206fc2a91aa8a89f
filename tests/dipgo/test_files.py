"""Outputs take the place of dipgo's own alone; JSON that cannot be read is one line."""

import errno
import os
import time
from pathlib import Path

import pytest

from dipgo.base.files import Kind, cache_root, new_file, new_folder, refuse_existing, refuse_to_fill, remove_drafts
from dipgo.base.records import read_json
from tests.checks import misused, refused

KNOWN_BY = "made.json"
KIND = Kind(KNOWN_BY, lambda folder: ("old",))


def write(path, force=True):
    with new_folder(path, force, KIND) as draft:
        (draft / KNOWN_BY).write_text("new")


def test_a_folder_is_replaced_with_force_alone(tmp_path):
    path = tmp_path / "out"
    write(path, force=False)
    (path / "old").write_text("old")
    with misused(r"out exists; give another path, or --force"):
        write(path, force=False)
    assert (path / "old").is_file()
    write(path)
    assert [file.name for file in path.iterdir()] == [KNOWN_BY]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_somebody_else_s_is_not_replaced_with_force(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
    mine = path / "photo" if kind == "folder" else path
    mine.write_text("mine")
    for refuse in (lambda: refuse_existing(path, True, KIND), lambda: write(path)):
        with misused(r"out: holds no made\.json, so --force does not replace it"):
            refuse()
    assert mine.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("beside", ["photo", "deep/photo", "link"])
def test_what_lies_beside_our_files_is_not_deleted(tmp_path, beside):
    write(tmp_path / "out")
    mine = tmp_path / "out" / beside
    mine.parent.mkdir(exist_ok=True)
    if beside == "link":
        mine.symlink_to(tmp_path)
    else:
        mine.write_text("mine")
    for refuse in (lambda: refuse_existing(tmp_path / "out", True, KIND), lambda: write(tmp_path / "out")):
        with misused(f"out: holds {beside}, which --force would delete .*; move it away"):
            refuse()
    assert mine.exists()


def test_what_comes_while_an_output_is_made_is_kept(tmp_path):
    path = tmp_path / "out"

    def work():
        with new_folder(path):
            path.mkdir()
            (path / "photo").write_text("mine")

    with misused("out exists"):
        work()
    assert (path / "photo").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    """Before any work where it can be told, else when it comes to it; nothing half written stays."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for below in (tmp_path / "file" / "s.json", tmp_path / "file" / "deep" / "s.json"):
        with misused(r"file is no folder that can be written to; give another path"):
            refuse_existing(below, True)
    with refused(r"folder: cannot be written \(Is a directory\)"), new_file(tmp_path / "folder"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_takes_no_files_is_refused_before_any_work(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with misused("is no folder that can be written to"):
            refuse_existing(tmp_path / "s.json", False)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("failing", [0, 1])
def test_the_old_folder_stays_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, failing):
    """As where one of the two is in use, or the disk fails, between the renaming of the old and of the new."""
    write(tmp_path / "out", force=False)
    (tmp_path / "out" / "old").write_text("old")
    calls, rename = [], Path.rename

    def busy(path, target):
        calls.append(path)
        if len(calls) == failing + 1:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    with refused(r"out: cannot be written \(Device or resource busy\)"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "old").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_root_and_mounts_are_never_replaced(tmp_path, monkeypatch):
    """A mount's files would be gone before its folder proves to be in use."""
    for refuse in (lambda: refuse_existing(Path("/"), True, KIND), lambda: write(Path("/"))):
        with misused(r"^/: (holds no made\.json|/ is no folder that can be written to)"):
            refuse()
    write(tmp_path / "out", force=False)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with misused("where a file system is mounted, which nothing replaces; give a folder in it"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / KNOWN_BY).is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
def test_a_folder_that_cannot_be_read_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir(mode=0)
    with misused(r"out: cannot be read \(Permission denied\); give another path"):
        refuse_existing(tmp_path / "out", True, KIND)


def test_a_folder_that_is_filled_keeps_what_it_has(tmp_path):
    refuse_to_fill(tmp_path / "new", force=False)
    with misused("exists; give another path, or --force"):
        refuse_to_fill(tmp_path, force=False)
    refuse_to_fill(tmp_path, force=True)
    (tmp_path / "file").write_text("mine")
    with misused("file is no folder that can be written to"):
        refuse_to_fill(tmp_path / "file", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("closed", ["out", "above"])
def test_what_is_filled_must_take_files_itself(tmp_path, closed):
    """The folder above need not: so it is with a volume in a container."""
    out = tmp_path / "out"
    out.mkdir()
    (out if closed == "out" else tmp_path).chmod(0o500)
    try:
        if closed == "above":
            refuse_to_fill(out, force=True)
        else:
            with misused("out is no folder that can be written to"):
                refuse_to_fill(out, force=True)
    finally:
        (out if closed == "out" else tmp_path).chmod(0o700)


def test_drafts_that_a_kill_left_go_and_nothing_else(tmp_path):
    kept = [".gitignore", ".nfs0001-abcdefg", ".notes-2026.md", "drops-0.35.json", "link"]
    for name in kept[:-1]:
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / ".git").mkdir()
    begun = [new_file(tmp_path / name) for name in ("run.json", "trial-0.35-late.safetensors")]
    for draft in begun:  # which are removed when they are forgotten
        draft.__enter__()
    assert len(list(tmp_path.iterdir())) == len(kept) + 3
    remove_drafts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".git"])


def test_drafts_of_past_days_go_when_something_is_written_beside_them(tmp_path):
    """What was moved aside stays until what was to replace it is there."""
    names = [".out.dipgo-abcdefgh", ".out.dipgo-abcdefgh-replaced", ".old.dipgo-abcdefgh-replaced", ".a-database"]
    for name in [*names, ".new.dipgo-abcdefgh"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    for name in names:
        os.utime(tmp_path / name, (0, time.time() - 90_000))
    with new_folder(tmp_path / "out"):
        pass
    with new_file(tmp_path / "x.json"):
        pass
    left = [".old.dipgo-abcdefgh-replaced", ".a-database", ".new.dipgo-abcdefgh", "out", "x.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_itself(tmp_path, there):
    target, path = tmp_path / "target", tmp_path / "out"
    if there:
        target.mkdir()
        (target / "photo").write_text("mine")
    path.symlink_to(target)
    for refuse in (lambda: write(path, force=False), lambda: new_file(path, force=False).__enter__()):
        with misused("out exists"):
            refuse()
    write(path)
    assert not path.is_symlink()
    assert (path / KNOWN_BY).read_text() == "new"
    assert target.exists() == there
    assert not there or (target / "photo").read_text() == "mine"


def test_a_folder_that_is_empty_or_that_one_is_in_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert (tmp_path / "out" / KNOWN_BY).read_text() == "new"
    monkeypatch.chdir(tmp_path / "out")
    Path("old").write_text("old")
    write(Path())
    assert [file.name for file in (tmp_path / "out").iterdir()] == [KNOWN_BY]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_where_things_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_root() == tmp_path / "cache" / "dipgo"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "dipgo"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_json_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with refused(r"x\.json: not a readable thing \("):
        read_json(tmp_path / "x.json", "thing")
