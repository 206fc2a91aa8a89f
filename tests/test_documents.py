"""README and docs: every command that they give parses, and those that take no minutes and no GPU run as they stand.

Blocks fenced as ``sh`` and ``python`` are run, those of one document in order and in one folder, but for those below a
line ``<!-- not run: why -->``; so are the commands that README lists. Searches are shortened.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from dipgo.cli.main import application
from tests.command import dipgo, sets
from tests.zoo import LEAST

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(<!-- not run: .+ -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = ", ".join(f"{name}={value}" for name, value in LEAST.items())
LONG = ("build", "serve", "bench", "recipe", "import", "compile")  # or in need of what README does not make


def blocks(document):
    """Return the fenced blocks as (language, text, whether it is to be run)."""
    return [(language, text, not skipped) for skipped, language, text in FENCE.findall(document.read_text())]


def commands(document):
    """Return the lines of dipgo in fenced blocks, without what is said about them: after two spaces or a hash."""
    for _, text, _ in blocks(document):
        for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
            if line.startswith("dipgo "):
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


def shortened(text):
    """Return a block whose searches take seconds."""
    text = re.sub(r"^dipgo (search|compile)\b", rf"dipgo \1 {' '.join(sets(LEAST))}", text, flags=re.MULTILINE)
    return re.sub(r"dipgo\.(search|compile)\((.*)\)", rf"dipgo.\1(\2, {QUICK})", text)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_run_as_they_stand(document, tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for language, text, runs in blocks(document):
        if not runs or language not in ("sh", "python"):
            continue
        command = ["bash", "-euc"] if language == "sh" else [sys.executable, "-c"]
        command.append(shortened(text))
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_commands_that_readme_lists_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands(ROOT / "README.md"):
        _, name, *rest = shlex.split(line.replace("MODEL", "digits-dit"))
        if name not in LONG:
            done = dipgo(name, *rest, *(sets(LEAST) if name == "search" else ()))
            assert done.code == 0, f"{line}: {done.err}"
            ran.append(name)
    assert {"models", "search", "inspect", "export", "verify", "run", "deploy", "doctor"} <= set(ran)
    assert (tmp_path / "out.png").is_file()
