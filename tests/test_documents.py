"""README and docs: every command that they give parses, and runs as it stands but where the page says why not.

Blocks fenced as ``sh`` and ``python`` are run, those of one page in order and in one folder with a small model, its
SubNet and its bundle at hand; not those below a line ``<!-- not run: why -->``. So are the commands that README lists.
Searches and measurements are shortened.
"""

import contextlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import dipgo as api
from dipgo.cli.main import application
from dipgo.schedule.subnet import save_subnet
from tests import zoo
from tests.command import dipgo, sets
from tests.zoo import LEAST

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(dipgo|python3?|pip|make|torchrun|curl|apt-get|\S+/bin/\S+|[A-Z_]+=\S+) ", re.MULTILINE)
SHORT = LEAST | {"drops": 0, "contenders": 1, "trial_iterations": 0}
QUICK = ", ".join(f"{name}={value}" for name, value in SHORT.items())
LONG = ("build", "serve", "bench", "judge", "recipe", "import", "compile")  # or in need of what README does not make
SUITE = "about: hardly anything\nbaselines: [fewer steps]\nimages: 0\nrepeats: 3\nseconds: 0\nscopes: [loop]\n"


def blocks(document):
    """Return the fenced blocks as (language, text, whether it is to be run)."""
    return [(language, text, not skipped) for skipped, language, text in FENCE.findall(document.read_text())]


def run_by_tests(document):
    """Return the blocks that are run."""
    return [(language, text) for language, text, runs in blocks(document) if runs and language in ("sh", "python")]


def lines_of(text):
    """Return the lines of a block, those joined that end in a backslash."""
    return re.sub(r"\s*\\\n\s*", " ", text).splitlines()


def commands(document, marked=True):
    """Return the lines of dipgo in fenced blocks, without what is said about them: after two spaces or a hash.

    ``marked``: those of blocks that are not to be run, too.
    """
    for _, text, runs in blocks(document):
        for line in lines_of(text):
            if line.startswith("dipgo ") and (runs or marked):
                in_one_column = re.sub(r"^(dipgo \w+) {1,6}(?=\S)", r"\1 ", line)
                yield re.split(r" {2,}| #", in_one_column)[0].strip()


def parse(line):
    """Parse a command line as ``dipgo`` would, without running it."""
    command, rest = get_command(application()), shlex.split(line)[1:]
    while isinstance(command, TyperGroup):
        _, command, rest = command.resolve_command(command.make_context("dipgo", ["x"], resilient_parsing=True), rest)
    command.make_context("dipgo", list(rest))


def options_of(command):
    """Return the options of a command, or of all commands of a group."""
    inner = [options_of(one) for one in getattr(command, "commands", {}).values()]
    return {"--help"}.union(*([*one.opts, *one.secondary_opts] for one in command.params), *inner)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_parses(document):
    for line in commands(document):
        parse(line)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_in_the_text_are_those_of_their_command(document):
    known = get_command(application()).commands
    for name, rest in re.findall(r"`dipgo (\w+)([^`]*)`", document.read_text()):
        assert name in known
        assert set(re.findall(r"(?<!\S)(--[\w-]+)", rest)) <= options_of(known[name]), f"dipgo {name}{rest}"


def test_every_command_has_an_example_that_parses():
    for line in examples(get_command(application())):
        parse(line)


def examples(command):
    """Yield the example in the help of each command of a group, and of the groups in it."""
    for one in command.commands.values():
        if isinstance(one, TyperGroup):
            yield from examples(one)
        else:
            yield one.epilog.partition("Example:\n")[2].strip()


@pytest.mark.parametrize("document", DOCUMENTS[1:], ids=lambda path: path.name)
def test_commands_are_run_or_the_page_says_why_not(document):
    for language, text, runs in blocks(document):
        assert not runs or language in ("sh", "python") or not COMMAND.search(text), text


def shortened(text):
    """Return a block whose searches and measurements take seconds."""
    text = re.sub(r"^(dipgo search .*)$", rf"\1 {' '.join(sets(SHORT))}", text, flags=re.MULTILINE)
    text = re.sub(r"^dipgo bench (?!--compare)", "dipgo bench --suite least.yaml ", text, flags=re.MULTILINE)
    text = re.sub(r"--images \d+", "--images 8", text)
    return re.sub(r"dipgo\.(search|compile)\((.*)\)", rf"dipgo.\1(\2, {QUICK})", text)


def stage(folder):
    """Make what the pages speak of: a model, prompts, a schedule of others, a SubNet and its bundle."""
    shutil.copytree(zoo.pipeline("sd"), folder / "my-model")
    (folder / "prompts.txt").write_text("a red fox\ntwo dogs\nthe harbour in the snow\n")
    (folder / "schedule.json").write_text(str([1, 0] * 10))
    (folder / "least.yaml").write_text(SUITE)
    shutil.copytree(ROOT / "dipgo" / "published", folder / "dipgo" / "published")
    with contextlib.chdir(folder):  # so that the SubNet's model is called as the pages call it
        subnet = api.search("my-model", steps=20, budget=0.35, prompts="prompts.txt", progress=False, **SHORT)
        save_subnet(subnet, Path("s.json"))
        api.export(subnet, "bundle", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("document", list(filter(run_by_tests, DOCUMENTS)), ids=lambda path: path.name)
def test_blocks_run_as_they_stand(document, tmp_path, monkeypatch):
    folder, page = tmp_path / "stage", document.read_text()
    if document == README:  # which needs nothing
        folder.mkdir()
    else:
        made = [] if "-o s.json" not in page else ["s.json", "s.safetensors", "bundle"]
        shutil.copytree(
            zoo.once("stage", stage), folder, ignore=lambda place, _: made if place.endswith("stage") else []
        )
    monkeypatch.chdir(folder)
    names = {}
    for language, text in run_by_tests(document):
        if language == "python":
            exec(shortened(text), names)
            continue
        for line in shortened("\n".join(lines_of(text))).splitlines():
            command, *arguments = shlex.split(line, comments=True) or [None]
            assert command in ("dipgo", None), f"{line}: say why it is not run"
            if command:
                done = dipgo(*arguments)
                assert done.code == 0, f"{line}\n{done.err}"


@pytest.mark.slow
def test_the_commands_that_readme_lists_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands(README, marked=False):
        _, name, *rest = shlex.split(line.replace("MODEL", "digits-dit"))
        if name not in LONG:
            done = dipgo(name, *rest, *(sets(SHORT) if name == "search" else ()))
            assert done.code == 0, f"{line}: {done.err}"
            ran.append(name)
    assert {"models", "search", "inspect", "export", "verify", "run", "doctor"} <= set(ran)
    assert (tmp_path / "out.png").is_file()
