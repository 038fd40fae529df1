"""Tasks of lm-evaluation-harness made of local files, of each kind of request that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

from saved import save_rows


def save_tasks(folder: Path) -> None:
    """In ``folder/tasks``, with their rows beside them."""
    rows = [
        {"q": f"{n} + {n} = ", "choices": [f"{2 * n}", f"{2 * n + 1}"], "right": 0, "text": "abc " * n}
        for n in range(1, 6)
    ]
    save_rows(folder / "rows.jsonl", *rows)
    files = {"data_files": {"test": str(folder / "rows.jsonl")}}
    shared = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    tasks: dict[str, dict[str, Any]] = {
        "sums": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{right}}",
        },
        "said": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
            "metric_list": [{"metric": "exact_match"}],
        },
        "prose": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, task in tasks.items():
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}))


def scores(model: Any, folder: Path) -> dict[str, Any]:
    """What a model of the harness makes of each question, by task."""
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    report = lm_eval.simple_evaluate(model, tasks=["sums", "said", "prose"], task_manager=manager, bootstrap_iters=0)
    samples = {
        task: [(s["resps"], s["filtered_resps"]) for s in sorted(items, key=lambda s: s["doc_id"])]
        for task, items in report["samples"].items()
    }
    return json.loads(json.dumps(samples))
