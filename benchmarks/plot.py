"""Draw results/figures.png from the JSON reports beside it.

python -m benchmarks.plot
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent.parent / "results"
GREY, BLUE, LIGHT = "#9aa0a6", "#2b7bb0", "#a8cbe2"


def report(name: str) -> dict[str, Any]:
    """One report."""
    values: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return values


def bars(axes: Any, title: str, unit: str, values: dict[str, tuple[float, str]]) -> None:
    """Labelled horizontal bars, the first on top."""
    names = list(values)[::-1]
    heights = [values[name][0] for name in names]
    drawn = axes.barh(names, heights, color=[values[name][1] for name in names])
    axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=9)
    axes.set_xlim(0, max(heights) * 1.18)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw the three panels."""
    decode, train = report("bench-decode"), report("bench-train")["loss_on_completion"]["steps"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 2.6), layout="constrained")
    steps = {name: step["median_ms"] for name, step in decode["batches"]["1"]["steps"].items()}
    bars(
        axes[0],
        "One decode step (batch 1, context 256)",
        "ms",
        {
            "ICaRus, one pass": (steps["icarus"], BLUE),
            "ICaRus, two passes": (steps["icarus, two passes"], LIGHT),
            "conventional LoRA": (steps["conventional"], GREY),
            "base model": (steps["base"], GREY),
        },
    )
    sides = {
        "ICaRus": ("icarus", BLUE),
        "LoRA, lean logits": ("conventional, logits where the loss is", GREY),
        "LoRA": ("conventional", GREY),
    }
    title = "One training step (2 x 768 + 96 tokens)"
    bars(axes[1], title, "s", {n: (train[key]["median_ms"] / 1e3, color) for n, (key, color) in sides.items()})
    memory = {n: (train[key]["peak_bytes"] / 1e9, color) for n, (key, color) in sides.items()}
    bars(axes[2], "Its memory above the model", "GB", memory)
    figure.savefig(RESULTS / "figures.png", dpi=130)


if __name__ == "__main__":
    main()
