"""Writes the ledger's tables into docs/inside-vllm.md: ``python -m tools.ledger_page``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from icarus.vllm.ledger import LEDGER
from icarus.vllm.patching import Hook, Override, Patch

PAGE = Path(__file__).parents[1] / "docs" / "inside-vllm.md"
BEGIN, END = "<!-- ledger: written by tools/ledger_page.py -->\n", "<!-- end of the ledger -->\n"
_ISSUES = "https://github.com/vllm-project/vllm/issues/"


def section() -> str:
    """What stands between the marks."""
    return "\n".join(line for hook, patches in groupby(LEDGER, lambda p: p.hook) for line in _of(hook, list(patches)))


def _of(hook: Hook, patches: list[Patch]) -> Iterator[str]:
    issues = [f"[issue {number}]({_ISSUES}{number})" for number in hook.issue.split(", ") if number]
    yield f"\n**Until {hook.until}**{f' ({chr(44).join(issues)})' if issues else ''}: {hook.why}.\n"
    yield "| function of vLLM | runner | what changes |"
    yield "|---|---|---|"
    for patch in patches:
        kind = ", in a subclass" if isinstance(patch, Override) else ""
        yield f"| `{patch.target.partition(':')[2]}` | {(patch.runner or 'both') + kind} | {patch.what} |"


def main() -> None:
    """Write the section."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + section() + "\n\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
