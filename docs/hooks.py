"""What mkdocs does beside rendering docs/: pages that lie elsewhere, links that lead out, references from the code.

README and its like stay where a checkout has them; the site shows them as pages. Any other file of the repository that
a page links to is copied into the site, so that no link needs a host.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

    from dipgo.base.config import Config

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ELSEWHERE = {  # pages of the site that are no files of docs/
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "results/index.md": "benchmarks/RESULTS.md",
    "models/digits-dit.md": "dipgo/zoo/digits-dit/README.md",
    "models/digits-flux.md": "dipgo/zoo/digits-flux/README.md",
    "models/emoji-sd.md": "dipgo/zoo/emoji-sd/README.md",
}
COPIES = "files"  # the site's folder for other files of the repository
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):<code>~?([^<]*)</code>")
UNIT = re.compile(r"(?<=<td>)([\d.,]+) (\w{1,7}|%)(?=</td>)")
GENERATED = re.compile(r"^<!-- made from the code: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill what is made from the code, and turn links of the checkout into links of the site."""
    place = page.file.src_uri
    source = ROOT / ELSEWHERE[place] if place in ELSEWHERE else DOCS / place
    if place == "index.md":
        page.meta["hide"] = ["navigation"]  # of one entry
    markdown = GENERATED.sub(lambda found: MADE[found[1]](), markdown)

    def link(found: re.Match[str]) -> str:
        bang, text, path, anchor = found[1], found[2], found[3], found[4] or ""
        if re.match(r"[a-z]+:", path):
            return found[0]
        target = (source.parent / path).resolve()
        if target.is_dir():  # which a site does not show
            return text
        uri = _uri(target, files, config)
        return f"{bang}[{LINK.sub(link, text)}]({os.path.relpath(uri, Path(place).parent)}{anchor})"

    return LINK.sub(link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings as code, without their names, and keep figures of tables with their units."""
    return UNIT.sub(r"\1&nbsp;\2", ROLE.sub(r"<code>\1</code>", html))


def _uri(target: Path, files: Files, config: MkDocsConfig) -> str:
    """Return where the site has a file of the repository, which is copied if it has it nowhere."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    if not target.is_file() or not target.is_relative_to(ROOT):
        raise PluginError(f"a link leads to {target}, which is not in the repository")
    name = target.relative_to(ROOT).as_posix()
    pages = [page for page, source in ELSEWHERE.items() if source == name]
    if pages:
        return pages[0]
    if target.suffix == ".md":
        raise PluginError(f"a link leads to {name}; name its page in ELSEWHERE of docs/hooks.py")
    uri = f"{COPIES}/{name}"
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, abs_src_path=str(target)))
    return uri


def commands() -> str:
    """Return the command line's reference, a section for each command, by typer's own writer."""
    from typer.cli import get_docs_for_click
    from typer.core import TyperGroup
    from typer.main import get_command

    from dipgo.cli.main import application

    group = get_command(application())
    assert isinstance(group, TyperGroup)
    context = group.make_context("dipgo", ["models"], resilient_parsing=True)
    listed, sections = [], []
    for name, command in group.commands.items():
        first = (command.help or "").partition("\n\n")[0].replace("\n", " ")
        listed.append(f"- [`dipgo {name}`](#dipgo-{name}): {first}")
        sections.append(get_docs_for_click(obj=command, ctx=context, indent=1, call_prefix="dipgo"))
    text = "\n".join([*listed, "", *sections])
    for pattern, plain in _TYPER:
        text = re.sub(pattern, plain, text, flags=re.MULTILINE)
    return text


_TYPER = (  # of what typer writes to what is shown
    (r"^\x08\n((?:.+\n)+)", r"```text\n\1```\n"),  # lines that are not to wrap
    (r"\[(default: [^\]]*|required)\]", r"(\1)"),  # no reference
    (r"^\* `--help`: .*\n", ""),
    (r"^\*\*Options\*\*:\n\n\n", ""),
    (r"^\*\*Usage\*\*:\n\n```console\n\$ ", "```sh\n"),
)


def settings() -> str:
    """Return a table for each config that has options."""
    from benchmarks.bench.config import BenchConfig, JudgeConfig
    from dipgo.searching.config import PRESETS, SearchConfig, Settings, TaskConfig
    from export.config import ExportConfig

    search = [name for name in SearchConfig.model_fields if name not in Settings.model_fields]
    sections = {
        "Search": _table(SearchConfig, search),
        "Search: how long and with what": _table(SearchConfig, list(Settings.model_fields)),
        "Export": _table(ExportConfig),
        "Bench": _table(BenchConfig),
        "Judge": _table(JudgeConfig),
    }
    assert set(TaskConfig.model_fields) <= set(search)
    presets = [f"- `{name}`: {_values(values)}" for name, values in PRESETS.items() if values]
    sections["Presets"] = "\n".join(["`preset` changes defaults:", "", *presets])
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())


def _table(kind: type[Config], names: list[str] | None = None) -> str:
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for name in names or list(kind.model_fields):
        field = kind.model_fields[name]
        default = "needed" if field.is_required() else "" if field.default in (None, ()) else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {(field.description or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in values.items())


def models() -> str:
    """Return what ``dipgo models`` prints, as tables."""
    from dipgo.graph.facts import read_facts

    facts = read_facts()
    lines = ["| name | denoiser | parameters | MACs per call | sites | weights |", "|---|---|---|---|---|---|"]
    for name, each in facts.models.items():
        sites = ", ".join(f"{count} {spec}" for spec, count in each.sites.items())
        lines.append(
            f"| `{name}` | {each.denoiser} | {each.parameters / 1e6:.1f} M | {each.macs / 1e9:.1f} G | {sites} | "
            f"{'with' if each.weights else 'without'} |"
        )
    return "\n".join([*lines, "", *_patterns(facts.families)])


def _patterns(families: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    for denoiser, sites in families.items():
        yield f"**{denoiser}**\n"
        yield from (f"- {spec}: {', '.join(f'`{each}`' for each in patterns)}" for spec, patterns in sites.items())
        yield ""


MADE: dict[str, Callable[[], str]] = {"commands": commands, "settings": settings, "models": models}
