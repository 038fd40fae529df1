"""``adapter_config.json``: as text that is no JSON, deep or huge, and with settings that are wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.soak.malformed.case import (
    CONFIG,
    ICARUS,
    Case,
    Damage,
    Outcome,
    either,
    harmless,
    on,
    refused,
    served,
)


def cases(kind: str) -> Iterator[Case]:
    """Of a kind of adapter; an ICaRus one also has a marker."""
    yield from _json()
    yield from _settings(kind)
    yield from _patterns()
    if kind == ICARUS:
        yield from _markers()


def edit(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The config as an object, changed."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        change(config)
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")

    return damage


def setting(**fields: Any) -> Damage:
    """Fields with other values."""
    return edit(lambda config: config.update(fields))


def without(field: str) -> Damage:
    """One field less."""
    return edit(lambda config: config.pop(field))


def _text(content: str) -> Damage:
    return on(CONFIG, lambda path: path.write_text(content, encoding="utf-8"))


def _again(change: Callable[[str], bytes]) -> Damage:
    """The config's own text in other bytes."""
    return on(CONFIG, lambda path: path.write_bytes(change(path.read_text(encoding="utf-8"))))


def _field(name: str, value: str) -> Damage:
    """One more field with a value that is JSON already, before all others."""
    return _again(lambda text: text.replace("{", f'{{"{name}": {value}, ', 1).encode())


def _json() -> Iterator[Case]:
    for what in ("{", "[]", "null", "7", '"adapter"', "NaN", "not json", "{}{}", "{'r': 8}", '{"r": 8,}'):
        yield refused(f"config {what}", _text(what), CONFIG)
    yield refused("config in UTF-16", _again(lambda text: text.encode("utf-16")), CONFIG)
    yield refused("config with a byte order mark", _again(lambda text: text.encode("utf-8-sig")), CONFIG)
    latin = _again(lambda text: text.encode().replace(b"{", b'{"x": "\xe9", ', 1))
    yield refused("config with a byte of Latin-1", latin, CONFIG)
    yield refused("config with a null character", _again(lambda text: text.encode() + b"\0"), CONFIG)
    yield refused("config deep as a list", _text("[" * 100_000), CONFIG)
    yield refused("config deep and whole", _field("x", "[" * 100_000 + "]" * 100_000), CONFIG)
    yield refused("config deep as objects", _field("x", '{"x":' * 100_000 + "1" + "}" * 100_000), CONFIG)
    yield either("config of 60 MB", _field("x", '"' + "x" * 60_000_000 + '"'))
    yield either("config with a number of 5000 digits", _field("x", "1" * 5000))
    fields = ",".join(f'"{number}":0' for number in range(10**6))
    yield either("config with a million fields", _field("x", f"{{{fields}}}"))
    yield served("r twice", _field("r", "4"))  # the last one counts, for JSON and for vLLM
    yield served("unknown fields", _field("from_tomorrow", '{"a": [1, null]}'))


def _settings(kind: str) -> Iterator[Case]:
    unread = refused if kind == ICARUS else either  # a field that vLLM does not read
    for rank in (0, -1, 4, 9, 1000, 10**9, 2**63, 10**30, 8.5, "8", True, None, [8], math.nan):
        yield refused(f"r is {rank!r}", setting(r=rank), "r |rank")
    yield refused("no r", without("r"), "r |rank")
    alphas: tuple[Any, ...] = (None, "16", True, [16], {}, math.nan, math.inf, 10**400)
    for alpha in alphas:
        yield refused(f"lora_alpha is {alpha!r:.30}", setting(lora_alpha=alpha), "lora_alpha")
    yield refused("no lora_alpha", without("lora_alpha"), "lora_alpha")
    yield harmless("lora_alpha is 1e300", setting(lora_alpha=1e300))
    yield served("a base model that no terminal can show", setting(base_model_name_or_path="\ud800"))
    yield served("base_model_name_or_path is 7", setting(base_model_name_or_path=7))
    yield from _targets(kind)
    for peft in ("IA3", "lora", None, 7):
        yield refused(f"peft_type is {peft!r}", setting(peft_type=peft), "peft_type")
    for task in ("SEQ_CLS", 7):
        yield unread(f"task_type is {task!r}", setting(task_type=task))
    yield refused("bias is 'all'", setting(bias="all"), "bias")
    yield refused("use_dora", setting(use_dora=True), "(?i)dora")
    yield refused("modules_to_save", setting(modules_to_save=["lm_head"]), "modules_to_save")
    yield refused("modules_to_save for a classifier", setting(modules_to_save=["score"]), "modules_to_save")
    yield refused("aLoRA", setting(alora_invocation_tokens=[1]), "(?i)alora")
    yield refused("layer_replication", setting(layer_replication=[[0, 2]]), "layer_replication")
    yield refused("lora_bias", setting(lora_bias=True), "lora_bias|lora bias")
    yield refused("PiSSA", setting(init_lora_weights="pissa_niter_4"), "init_lora_weights")
    yield unread("use_rslora is 'yes'", setting(use_rslora="yes"))
    yield served("use_rslora", setting(use_rslora=True))
    yield unread("lora_dropout is NaN", setting(lora_dropout=math.nan))
    yield either("fan_in_fan_out", setting(fan_in_fan_out=True))


def _targets(kind: str) -> Iterator[Case]:
    unread = refused if kind == ICARUS else either
    odd: list[Any] = [[], "", None, {}, [1], [None], 7, ["nowhere"], ["q_proj"], "all-linear-layers", "(", ".*nowhere"]
    for targets in odd:
        says = "target_modules|target|weights"
        yield refused(f"target_modules is {targets!r}", setting(target_modules=targets), says)
    yield refused("no target_modules", without("target_modules"), "target_modules")
    yield served("target_modules twice", edit(lambda c: c["target_modules"].extend(c["target_modules"])))
    yield either("a target more", edit(lambda c: c["target_modules"].append("nowhere")))
    yield refused("targets that no terminal can show", setting(target_modules=["\ud800"]))
    yield refused("targets with a line break", setting(target_modules=["q_proj\nicarus: all is well"]))
    yield refused("a target that takes for ever", setting(target_modules=r"(([a-z_.0-9]+)+)+!"))
    yield either("100,000 targets", edit(lambda c: c["target_modules"].extend(map(str, range(100_000)))))
    yield refused("layers_to_transform of another layer", setting(layers_to_transform=[7]))
    yield unread("layers_pattern that is no expression", setting(layers_to_transform=[0], layers_pattern="("))
    yield refused("exclude_modules of a target", setting(exclude_modules=["o_proj"]), "o_proj|exclude")


def _patterns() -> Iterator[Case]:
    yield refused("rank_pattern with another rank", setting(rank_pattern={"o_proj": 4}), "rank")
    yield refused("rank_pattern with rank 0", setting(rank_pattern={"o_proj": 0}), "rank")
    yield refused("rank_pattern is a list", setting(rank_pattern=["o_proj"]), "rank_pattern")
    yield refused("rank_pattern that is no expression", setting(rank_pattern={"(": 8}), "rank_pattern")
    yield either("rank_pattern of a module that is not there", setting(rank_pattern={"nowhere": 100}))
    yield refused("alpha_pattern with NaN", setting(alpha_pattern={"o_proj": math.nan}), "alpha")


def _markers() -> Iterator[Case]:
    def marker(**fields: Any) -> Damage:
        return edit(lambda config: config["icarus"].update(fields))

    yield Case("no marker", without("icarus"), Outcome.CONVENTIONAL, "plain LoRA")
    markers: list[Any] = [None, True, "yes", [], {}]
    for value in markers:
        yield refused(f"marker is {value!r}", setting(icarus=value), "marker")
    for version in (0, 2, "1", 1.5, True, None):
        yield refused(f"marker version {version!r}", marker(version=version), "marker")
    for mark in ("", "0" * 64, "XYZ", None, 7, ["ab"], "\ud800"):
        yield refused(f"base_fingerprint {mark!r:.12}", marker(base_fingerprint=mark), "base|marker")
    yield refused("k_proj as a target", edit(lambda c: c["target_modules"].append("k_proj")), "k_proj")
