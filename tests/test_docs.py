"""What the documents name exists: links, anchors, paths and modules."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.pages.places import PLACE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
TYPED = {page: PLACE.sub("", page.read_text()) for page in PAGES}  # tables of results name what their commit had
FOLDERS = "dipgo|export|engines|benchmarks|training|tests|docs|examples"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path):
    paths = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w)", TYPED[page])
    for path in paths:
        placeholder = any(part.isupper() for part in re.split(r"[/.]", path))
        assert placeholder or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_exist(page: Path):
    for module in re.findall(r"python -m ([\w.]+)", TYPED[page]):
        assert find_spec(module), module


def test_pages_that_the_code_names_exist():
    for folder in FOLDERS.split("|")[:5]:
        for file in (ROOT / folder).rglob("*.py"):
            for path in re.findall(r"\bdocs/[\w./-]+\.md\b", file.read_text()):
                assert (ROOT / path).is_file(), f"{file}: {path}"


def test_readme_is_short_and_so_is_the_map():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    assert len(readme.encode()) <= 10_000
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 60


def test_the_errors_that_troubleshooting_quotes_are_those_of_the_code():
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    code = " ".join(path.read_text() for folder in FOLDERS.split("|")[:4] for path in (ROOT / folder).rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings over several lines
    quoted = [text for entry in re.findall(r"^- (`.*?`):", page, re.MULTILINE) for text in re.findall("`(.*?)`", entry)]
    assert len(quoted) > 40
    for part in (part.strip(" '") for text in quoted for part in text.split("…")):
        assert part in code, part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_speaks_of_aims_or_of_its_own_past(page: Path):
    for phrase in ("was the aim", "were the aim", "from before", "halves of guidance", "fixed policy"):
        assert phrase not in page.read_text(), phrase
