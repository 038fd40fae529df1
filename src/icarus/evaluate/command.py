"""``icarus eval``: a base model and adapters of both kinds over the same items, side by side."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icarus import arguments, team
from icarus.bench import measure
from icarus.context import BASE
from icarus.errors import InputError
from icarus.evaluate import report, scorers, task_files
from icarus.evaluate.records import Records
from icarus.evaluate.run import digest, evaluate
from icarus.evaluate.sides import Sides
from icarus.evaluate.tasks import Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus eval``."""
    team.add_arguments(parser, "an adapter of either kind; repeatable")
    parser.add_argument(
        "--task",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="YAML files of tasks (docs/evaluate.md)",
    )
    parser.add_argument(
        "--against", default=BASE, metavar="NAME", help=f"what the others are compared with (default: {BASE})"
    )
    parser.add_argument("--limit", type=arguments.positive_int, metavar="N", help="only the first N items of each task")
    parser.add_argument(
        "--batch-size", type=arguments.positive_int, default=8, metavar="N", help="items in one pass (default: 8)"
    )
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="run the programs that models write for tasks with scorer 'code', in a sandbox",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the figures and every item as JSON (- prints them as the last line); what is finished is kept in "
        "FILE.partial until then, and the same command resumes from it",
    )


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate, print a table for each task, and write the report.

    Raises:
        InputError: a task, an adapter or a name cannot be used; nothing has run.
    """
    tasks = [task_files.read(file, limit=options.limit) for file in options.task]
    _refuse_twins(tasks)
    for task in tasks:
        task.check_confirmed(confirm_run_unsafe_code=options.confirm_run_unsafe_code)
    sides = Sides.load(options.base, options.adapter, dtype=options.dtype)
    if options.against not in sides.kinds:
        raise InputError(f"--against {options.against} is no side; there are {', '.join(sides.kinds)}.")
    identity = {
        "base": options.base,
        "sides": sides.identities,
        "dtype": str(sides.model.dtype).removeprefix("torch."),
        "tasks": {task.name: digest(task, sides.codec) for task in tasks},
        "scorers": hashlib.sha256(Path(scorers.__file__).read_bytes()).hexdigest()[:12],
    }
    file = None if options.json in (None, "-") else Path(options.json)
    records = Records(file, identity)
    try:
        _evaluate(sides, tasks, records, options)
    except KeyboardInterrupt:
        kept = "Nothing was kept. With --json FILE what is finished is, and is not done again."
        if file:
            kept = f"What is finished is in {file}.partial; the same command goes on from there."
        print(kept, file=sys.stderr)
        raise
    figures = report.summary(records.outcomes, sides.kinds, options.against)
    report.show(figures, options.against)
    if options.json:
        whole = {
            "settings": measure.settings(**identity, batch_size=options.batch_size, limit=options.limit),
            "against": options.against,
            "tasks": figures,
            "items": [asdict(outcome) for outcome in records.outcomes],
        }
        arguments.write_json(whole, options.json)
    records.finish()
    return None


def _evaluate(sides: Sides, tasks: Sequence[Task], records: Records, options: argparse.Namespace) -> None:
    for task in tasks:
        for outcome in evaluate(
            sides,
            task,
            batch_size=options.batch_size,
            done=records.done(task.name),
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            lines=True,
        ):
            records.add(outcome)


def _refuse_twins(tasks: list[Task]) -> None:
    names = [task.name for task in tasks]
    if twins := {name for name in names if names.count(name) > 1}:
        raise InputError(f"Two tasks are named {min(twins)!r}; give one of them another 'name' in its file.")
