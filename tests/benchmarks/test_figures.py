"""The figures that pages quote are those in results/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures
from benchmarks.figures import ROOT, SHIPPED, TABLES, BadPage

PAGES = sorted(figures.pages())


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_a_page_has_the_figures_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert figures.written(text) == text, "run: make figures"


def test_every_table_stands_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall("<!-- figures: (.+) -->", text)) == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_changed_figure_is_seen(name: str) -> None:
    page = (
        f"Before.\n\n<!-- figures: {name} -->\n{figures.markdown(TABLES[name]())}<!-- end of figures -->\n\nBehind.\n"
    )
    assert figures.written(page) == page
    for number in {match.start() for match in re.finditer(r"\d", page.split("-->")[1])}:
        place = number + page.index("-->") + len("-->")
        changed = page[:place] + str((int(page[place]) + 1) % 10) + page[place + 1 :]
        assert figures.written(changed) == page


def test_an_arm_is_compared_over_the_seeds_that_were_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def arm(*scores: float | None) -> dict[str, Any]:
        seeds = [
            {"trainable": 1} if score is None else {"trainable": 1, "loss": 1.0, "score": score} for score in scores
        ]
        return {"rate": 0.1, "seeds": {str(seed): run for seed, run in enumerate(seeds)}}

    summary = {"tasks": {"sums": {"conventional": arm(0.2, 0.4), "icarus": arm(0.3, None)}}}
    monkeypatch.setattr(figures, "result", lambda _: summary)
    *_, icarus = figures.accuracy("any")
    assert icarus[-2:] == ["30.0 %", "+10.0 points"]


def test_the_headline_is_six_figures_with_losses_among_them() -> None:
    head, *rows = TABLES["headline"]()
    assert len(rows) == 6
    assert {len(cells) for cells in (head, *rows)} == {4}
    assert "we lose" in rows[-1][-1]
    links = re.findall(r"\]\(([^)#]+)", figures.markdown([head, *rows]))
    assert len(links) == 6
    assert all((ROOT / link).is_file() for link in links)


def test_the_package_carries_the_scores_of_its_specialists() -> None:
    assert json.loads((SHIPPED / "figures.json").read_text(encoding="utf-8")) == figures.shipped()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- figures: luck -->\n<!-- end of figures -->\n", "no figures 'luck'"),
        ("<!-- figures: headline -->\n| |\n", "begin or end alone"),
        ("| |\n<!-- end of figures -->\n", "begin or end alone"),
        ("<!-- figures: headline -->\n<!-- figures: headline -->\n<!-- end of figures -->\n", "begin or end alone"),
    ],
)
def test_a_marker_that_says_nothing_is_an_error(text: str, said: str) -> None:
    with pytest.raises(BadPage, match=said):
        figures.written(text)
