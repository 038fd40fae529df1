"""Specialists that work together, end to end: plan, SQL by that plan, explanation of that SQL, on unseen tables.

    python -m experiments.wikisql_roles.chain --data data/roles --rows 120 --json results/chain.json \
        --shared icarus=adapters/icarus team=adapters/team --conventional lora=adapters/lora

Each folder has one adapter folder a role, and ``base`` if it was trained on another base model than ``--base``, as
``icarus train --team`` writes it. The specialists of ``--shared`` are ICaRus adapters and continue one another in one
context, on one cache. Those of ``--conventional`` are ordinary LoRA of the same roles, which each read the whole
conversation anew. Nobody is helped: a wrong plan goes on into the query, and a wrong query into the explanation. All
sides answer greedily, about the same tables. Figures have 95 % intervals by bootstrap over tables; differences to the
conventional side are paired:

    plan           the planner names the columns of the reference
    sql            the query is the reference
    sql if plan    the same, where the plan was right
    explanation    token F1 of the explanation and the question that a person asked

and how many tokens were read for a chain.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from experiments.wikisql_roles.data import ASK_MEANING, ASK_SQL, ROLES
from experiments.wikisql_roles.score import token_f1
from icarus import Specialists, arguments, packaged_model
from icarus.bench.measure import settings
from icarus.evaluate import Sides
from icarus.evaluate.report import difference

LIMITS = {"planner": 48, "sql": 96, "explainer": 64}

Message = dict[str, str]
Table = dict[str, Any]


def tables(data: Path, count: int) -> list[Table]:
    """What each chain is asked and should answer: from the test rows of the role sql, which hold the plan, too."""
    found = []
    for line in (data / "sql_test.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        system, question, plan, _ = row["prompt"]
        columns, asked = question["content"].split("\nQuestion: ")
        found.append(
            {
                "start": [system, question],
                "columns": columns,
                "question": asked,
                "plan": plan["content"],
                "sql": row["completion"][0]["content"],
            }
        )
    return found


def asked_next(role: str, table: Table, answers: dict[str, str]) -> list[Message]:
    """The messages in front of a role's turn that were not there before."""
    if role == "planner":
        return list(table["start"])
    if role == "sql":
        return [{"role": "user", "content": ASK_SQL}]
    return [{"role": "user", "content": f"{table['columns']}\nQuery: {answers['sql']}\n{ASK_MEANING}"}]


def shared_chain(team: Specialists, table: Table) -> tuple[dict[str, str], int]:
    """Answers by role on one cache, and how many tokens were read."""
    context, answers, read = team.context(), dict[str, str](), 0
    for role in ROLES:
        turn = context.append(asked_next(role, table, answers)).generate(role, max_new_tokens=LIMITS[role])
        answers[role], read = turn.text, read + turn.encoded_tokens
    return answers, read


def conventional_chains(sides: Sides, asked: Sequence[Table], batch: int) -> list[tuple[dict[str, str], int]]:
    """The same by models that share nothing: each reads the conversation so far."""
    chats: list[list[Message]] = [[] for _ in asked]
    done: list[tuple[dict[str, str], int]] = [({}, 0) for _ in asked]
    for role in ROLES:
        prompts = []
        for chat, table, (answers, _) in zip(chats, asked, done, strict=True):
            chat += asked_next(role, table, answers)
            prompts.append(sides.codec.encode(sides.codec.render(chat, header=True), rendered=True))
        with sides.side(role) as side:
            texts = [
                answer.text
                for start in range(0, len(prompts), batch)
                for answer in side.generate(prompts[start : start + batch], max_new_tokens=LIMITS[role])
            ]
        for i, text in enumerate(texts):
            chats[i].append({"role": "assistant", "content": text})
            done[i] = {**done[i][0], role: text}, done[i][1] + len(prompts[i])
    return done


def scores(table: Table, answers: dict[str, str]) -> dict[str, float]:
    """Of one chain."""
    plan, query = answers["planner"].strip() == table["plan"], answers["sql"].strip() == table["sql"]
    return {
        "plan": float(plan),
        "sql": float(query),
        "sql if plan": float(query) if plan else float("nan"),
        "explanation": token_f1(answers["explainer"], table["question"]),
    }


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Mean with its interval, over those that are there."""
    there = np.array([value for value in values if value == value])
    return {**difference(there, np.ones_like(there)), "tables": len(there)} if len(there) else {"tables": 0}


def summary(sides: dict[str, list[dict[str, float]]], peer: str | None) -> dict[str, Any]:
    """Each side's figures, and its differences to the peer's."""
    names = list(next(iter(sides.values()))[0])
    report: dict[str, Any] = {
        side: {name: figure([one[name] for one in own]) for name in names} for side, own in sides.items()
    }
    for side in sides if peer else ():
        if side != peer:
            pairs = list(zip(sides[side], sides[str(peer)], strict=True))
            report[f"{side} - {peer}"] = {name: figure([one[name] - its[name] for one, its in pairs]) for name in names}
    return report


def base_of(folder: Path, base: str) -> str:
    """The base model that a side's adapters were trained on."""
    return str(folder / "base") if (folder / "base").is_dir() else base


def adapters(folder: Path) -> dict[str, Path]:
    """One a role."""
    return {role: folder / role for role in ROLES}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py wrote")
    parser.add_argument("--base", default=packaged_model.PACKAGED)
    parser.add_argument("--shared", nargs="+", type=_named, required=True, metavar="NAME=DIR", help="ICaRus adapters")
    parser.add_argument("--conventional", type=_named, metavar="NAME=DIR", help="conventional adapters")
    parser.add_argument("--rows", type=int, default=200, help="tables (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", required=True, help="file to write")
    options = parser.parse_args()
    asked = tables(options.data, options.rows)
    chains = {}
    for name, folder in options.shared:
        team = Specialists.load(base_of(folder, options.base), adapters(folder), dtype=options.dtype)
        chains[name] = [shared_chain(team, table) for table in track(asked, name)]
    peer = None
    if options.conventional:
        peer, folder = options.conventional
        sides = Sides.load(base_of(folder, options.base), adapters(folder), dtype=options.dtype)
        chains[peer] = conventional_chains(sides, asked, 16)
    results = {
        side: [scores(table, answers) for table, (answers, _) in zip(asked, own, strict=True)]
        for side, own in chains.items()
    }
    report = {
        "settings": settings(base=options.base, dtype=options.dtype, tables=len(asked)),
        **summary(results, peer),
        "tokens read for a chain": {side: statistics.mean(read for _, read in own) for side, own in chains.items()},
        "answers": {side: [answers for answers, _ in own] for side, own in chains.items()},
    }
    arguments.write_json(report, options.json)
    print(json.dumps({name: report[name] for name in report if name != "answers"}, indent=1))


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, Path(folder)


if __name__ == "__main__":
    main()
