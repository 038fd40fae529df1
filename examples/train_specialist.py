"""Train a specialist in Python, save it, and ask it beside its base model.

    .venv/bin/python examples/train_specialist.py                        # two minutes on 2 CPU cores
    .venv/bin/python examples/train_specialist.py --steps 200 --output adapters/better-dates

The task is small enough to learn in 40 steps: write a date the ISO way. The rows come from the calendar, so nothing is
downloaded but the base model.
"""

from __future__ import annotations

import argparse
import random
from datetime import date, timedelta
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

import icarus
from icarus.train import IcarusSFTTrainer

TARGETS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # every projection but those of K and V
SPELLINGS = ["{0:%B} {0.day}, {0.year}", "{0.day} {0:%B} {0.year}", "{0:%A}, {0.day} {0:%b} {0.year}"]


def question(day: date, spelling: str) -> list[dict[str, str]]:
    """What a user asks, as chat messages."""
    return [{"role": "user", "content": f"Write this date as YYYY-MM-DD: {spelling.format(day)}"}]


def rows(count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """TRL's conversational prompt/completion format: the loss is on the completion alone."""
    draw = random.Random(seed)
    days = [date(1900, 1, 1) + timedelta(days=draw.randrange(73_000)) for _ in range(count)]
    return [
        {
            "prompt": question(day, draw.choice(SPELLINGS)),
            "completion": [{"role": "assistant", "content": day.isoformat()}],
        }
        for day in days
    ]


def train(base: str, output: Path, steps: int) -> None:
    """Write an ICaRus adapter directory to ``output``."""
    trainer = IcarusSFTTrainer(
        base,
        args=SFTConfig(
            str(output),
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            logging_steps=max(1, steps // 8),
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            bf16=False,
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=Dataset.from_list(rows(16 * steps, seed=1)),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS),
    )
    trainer.train()
    trainer.save_model()


def score(team: icarus.Specialists, model: str, count: int) -> float:
    """Share of unseen rows that ``model`` answers to the letter."""
    right = 0
    for row in rows(count, seed=2):
        context = team.context().append(row["prompt"])
        right += context.generate(model, max_new_tokens=24).text == row["completion"][0]["content"]
    return right / count


def main() -> None:
    """Train, then let base model and specialist answer the same unseen rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default=icarus.PACKAGED, help="hub id, folder, or the packaged small model (default)")
    parser.add_argument("--output", type=Path, default=Path("adapters/dates"), help="adapter directory to write")
    parser.add_argument("--steps", type=int, default=40, help="training steps of 16 rows (default: 40)")
    parser.add_argument("--rows", type=int, default=20, help="unseen rows to score (default: 20)")
    options = parser.parse_args()

    train(options.base, options.output, options.steps)
    team = icarus.Specialists.load(options.base, {"dates": options.output})
    for model in team.names:
        print(f"{model:>6}: {score(team, model, options.rows):.0%} of {options.rows} unseen dates right")


if __name__ == "__main__":
    main()
