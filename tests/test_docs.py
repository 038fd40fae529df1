"""What the pages name exists: the files and headings that they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [".", "docs", "docs/decisions", "examples", "experiments", "benchmarks", "results", "src/icarus/shipped"]
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))

_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def prose(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    return _CODE.sub("", _FENCED.sub("", text))


def links(text: str) -> list[str]:
    """Targets of a page's relative links."""
    return [target for target in _LINK.findall(prose(text)) if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page; a second one of the same words gets a number."""
    names: list[str] = []
    for heading in _HEADING.findall(_FENCED.sub("", text)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        again = sum(other == name for other in names)
        names.append(f"{name}-{again}" if again else name)
    return set(names)


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    lost = []
    for target in links(page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            lost.append(f"{target}: no such file")
        elif heading and heading not in anchors(file.read_text(encoding="utf-8")):
            lost.append(f"{target}: no such heading")
    return lost


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_link_to_nowhere_is_seen(tmp_path: Path) -> None:
    other, page = tmp_path / "other.md", tmp_path / "page.md"
    other.write_text("# One: two, `three`\n\n## Same\n\n```\n# no heading\n```\n\n## Same\n")
    page.write_text(
        "[a](other.md) [b](other.md#one-two-three) [c](other.md#same-1) [d](#here) [e](https://no.example)\n"
        "`[f](nowhere)` [g](nowhere.md) [h](other.md#no-heading)\n![i](nowhere.png)\n\n# Here\n"
    )
    assert broken(page) == [
        "nowhere.md: no such file",
        "other.md#no-heading: no such heading",
        "nowhere.png: no such file",
    ]
