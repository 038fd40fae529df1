"""What the pages name exists: files, headings and commands."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

from icarus import cli

ROOT = Path(__file__).parents[1]
FOLDERS = [".", "docs", "docs/decisions", "examples", "experiments", "benchmarks", "results", "src/icarus/shipped"]
CARDS = sorted((ROOT / "src" / "icarus" / "shipped").glob("*/README.md"))
PAGES = [*sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md")), *CARDS]
LIVING = [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")]  # the others tell what was
SOURCE = ROOT / "src" / "icarus"
MAP = ROOT / "docs" / "architecture.md"
PLACES = (ROOT, SOURCE.parent, SOURCE, SOURCE / "vllm", SOURCE / "vllm" / "cpu")  # where a page may begin a path
OF_OTHERS = {"lora/ops/torch_ops/lora_ops.py", "vllm/config/vllm.py", "vllm/lora/ops/torch_ops/lora_ops.py"}
OF_OTHERS |= {"vllm/v1/worker/gpu_model_runner.py"}  # all of vLLM

_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}.*\n?)+", re.MULTILINE)
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


# ------------------------------------------------------------------------------------------- files and names


def quoted(text: str) -> list[str]:
    """What stands in backquotes within a line."""
    return [code[1:-1] for code in _CODE.findall(_FENCED.sub("", text))]


def lost_files(text: str, beside: Path = ROOT) -> list[str]:
    """Files that a page names as ours and that there are not: sources anywhere, others by their folder.

    ``beside`` is the page's folder, of whose folders it may name files, too.
    """
    ours = re.compile(r"[\w./-]+\.(?:py|cpp)|(?:src|tests|docs|results|examples|experiments|benchmarks)/[\w./-]*")
    named = [name for name in quoted(text) if ours.fullmatch(name) and name not in OF_OTHERS]
    places = [*PLACES, *(path for path in beside.iterdir() if path.is_dir())]
    return [name for name in named if not any((place / name).exists() for place in places)]


def undefined(text: str) -> list[str]:
    """Classes and methods that a page names, and that the package does not define."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    known = set(re.findall(r"^ *(?:class|def|async def) (\w+)", source, re.MULTILINE))
    names = [name for name in quoted(text) if re.fullmatch(r"[A-Z][a-z]\w*(\.\w+)?", name)]
    return [name for name in names if not known.issuperset(name.split("."))]


@pytest.mark.parametrize("page", LIVING, ids=[str(page.relative_to(ROOT)) for page in LIVING])
def test_files_that_a_page_names_are_there(page: Path) -> None:
    assert lost_files(page.read_text(encoding="utf-8"), page.parent) == []


def test_a_lost_name_is_seen() -> None:
    assert lost_files(
        "`src/icarus/gone.py` `gone.cpp` `docs/gone` `cli.py` `data/rows` `tests/`\n```\n`gone.py`\n```"
    ) == [
        "src/icarus/gone.py",
        "gone.cpp",
        "docs/gone",
    ]
    assert undefined("`TwoStreams.loss` `TwoStreams.gone` `Gone` `gone`") == ["TwoStreams.gone", "Gone"]


def test_names_in_the_map_are_defined() -> None:
    assert undefined(MAP.read_text(encoding="utf-8")) == []


def test_the_picture_shows_what_is_there() -> None:
    shown = re.findall(r">([\w/]+(?:\.py|/))<", (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8"))
    assert len(shown) > 10
    assert [name for name in shown if not any((place / name).exists() for place in PLACES)] == []


# ------------------------------------------------------------------------------------------- commands


def code(text: str) -> str:
    """All code of a page: fenced, indented and within a line; a line that goes on behind a backslash is one."""
    blocks = _FENCED.findall(text) + _INDENTED.findall(_FENCED.sub("", text)) + quoted(text)
    return re.sub(r"\\\n\s*", " ", "\n".join(blocks))


def commands(text: str, program: str) -> set[str]:
    """The words behind a program's name, in code."""
    return set(re.findall(rf"(?<!from )(?<![\w.-]){program} ([a-z][a-z-]*)(?![\w=.])", code(text), re.MULTILINE))


def flags(text: str) -> dict[str, set[str]]:
    """The flags that stand behind ``icarus COMMAND``, in code, by command."""
    by_command: dict[str, set[str]] = {}
    for command, words in re.findall(r"(?<![\w.-])icarus ((?:bench )?[a-z][a-z-]*)(.*)", code(text)):
        own = re.split(r" # |[|;&]", words)[0]
        by_command.setdefault(command, set()).update(re.findall(r"(?<!\S)--[a-z][\w-]*", own))
    return {command: names for command, names in by_command.items() if names}


@cache
def help_of(command: str) -> str:
    """What ``icarus COMMAND --help`` prints."""
    with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
        assert cli.main([*command.split(), "--help"]) == 0
    return printed.getvalue()


def unknown_flags(text: str) -> list[str]:
    """Flags that a page gives to a command that has none of that name."""
    named = [(command, flag) for command, names in flags(text).items() for flag in sorted(names)]
    return [f"{command} {flag}" for command, flag in named if not re.search(rf"{flag}(?![\w-])", help_of(command))]


@pytest.mark.parametrize("page", LIVING, ids=[str(page.relative_to(ROOT)) for page in LIVING])
def test_commands_on_a_page_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    bench = cli.COMMANDS["bench"]
    assert isinstance(bench, cli.Group)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands(text, "icarus") <= {*cli.COMMANDS}
    assert commands(text, "icarus bench") <= {*bench.commands}
    assert commands(text, "make") <= {*targets}


@pytest.mark.parametrize("page", LIVING, ids=[str(page.relative_to(ROOT)) for page in LIVING])
def test_flags_of_commands_on_a_page_are_there(page: Path) -> None:
    assert unknown_flags(page.read_text(encoding="utf-8")) == []


def test_a_flag_is_seen() -> None:
    page = "Text:\n\n    icarus bench agents --quick \\\n        --quack=1 # --comment\n\n"
    page += "`icarus verify DIR --bas`, --prose\n"
    page += "```\nicarus verify DIR --base BASE | grep --count x\n```\n"
    assert flags(page) == {"bench agents": {"--quick", "--quack"}, "verify": {"--bas", "--base"}}
    assert unknown_flags(page) == ["verify --bas", "bench agents --quack"]


def test_a_command_is_seen() -> None:
    page = "```\nicarus serve BASE\nbin/icarus bench agents --quick\nmake test-fast\n```\n"
    page += "`icarus verify DIR`, icarus flies\n\n    icarus train --base BASE\n\n"
    page += "```python\nfrom icarus import adapter\nimport icarus\n```\n"
    assert commands(page, "icarus") == {"serve", "bench", "verify", "train"}
    assert commands(page, "icarus bench") == {"agents"}
    assert commands(page, "make") == {"test-fast"}


# ------------------------------------------------------------------------------------------- programs


def test_the_front_pages_python_prints_what_it_says() -> None:
    """On the packaged model, which takes a minute to unpack where no command has done so."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (place,) = (place for place, (language, _) in enumerate(blocks) if language == "python")
    program, printed = blocks[place][1], blocks[place + 1][1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


# ------------------------------------------------------------------------------------------- decisions

RECORDS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))


@pytest.mark.parametrize("record", RECORDS, ids=[record.stem for record in RECORDS])
def test_a_decision_is_a_page_in_the_index(record: Path) -> None:
    text = record.read_text(encoding="utf-8")
    headings = ["Context", "Decision", "What was weighed", "Consequences", "When to look again"]
    assert re.findall("^## (.+)$", text, re.MULTILINE) == headings
    assert len(text.split()) < 500
    assert f"]({record.name})" in (record.parent / "README.md").read_text(encoding="utf-8")
