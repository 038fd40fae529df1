"""``icarus distill``: from a conventional adapter to a specialist, by the same way as ``icarus train``."""

from __future__ import annotations

import argparse
from typing import Any

from icarus import arguments
from icarus.train import run as training
from icarus.train.config import DISTILL


def add_arguments(parser: arguments.Parser) -> None:
    """``--json``; all other flags are those of the two dataclasses, which TRL's parser reads."""
    arguments.add_json(parser)
    parser.pass_on(help=DISTILL.help_text)


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Distil, and return what was done as the report; of several processes, the first one alone."""
    return training.report(training.train(*DISTILL.parse(options.rest)))
