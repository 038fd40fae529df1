"""The specialists that a command plays with: the flags that name them, and loading."""

from __future__ import annotations

import argparse

from icarus import packaged_model
from icarus.arguments import NamedPaths
from icarus.context import Specialists


def add_arguments(parser: argparse.ArgumentParser, adapter: str = "a specialist; repeatable") -> None:
    """``--base``, ``--adapter`` and ``--dtype``."""
    packaged = packaged_model.PACKAGED
    others = f"{packaged} (default), or {packaged_model.PREPARED}, that of the shipped specialists"
    parser.add_argument("--base", default=packaged, help=f"hub id, folder, {others}")
    parser.add_argument("--adapter", action=NamedPaths, default={}, metavar="NAME=PATH", help=adapter)
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights (default: %(default)s)")


def load(options: argparse.Namespace) -> Specialists:
    """The specialists of these options.

    Raises:
        InputError: a base model or an adapter cannot be read or is refused.
    """
    return Specialists.load(options.base, options.adapter, dtype=options.dtype)
