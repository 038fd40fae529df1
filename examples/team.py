"""A team of specialists in Python: they take turns in one context, and none of them prefills what is there already.

    .venv/bin/python examples/team.py
    .venv/bin/python examples/team.py --columns player goals team --question "Who scored more than 10 goals?"

The specialists are the shipped ones; --specialist NAME=PATH takes others of the same names.
"""

from __future__ import annotations

import argparse

import icarus
from icarus import Context, Turn

COLUMNS = ["date", "opponent", "score", "attendance"]
QUESTION = "What was the score against Chelsea?"


def ask(context: Context, model: str, text: str, limit: int) -> Turn:
    """One turn of the conversation; prints who spoke, and how much of the context was in the cache."""
    turn = context.append([{"role": "user", "content": text}]).generate(model, max_new_tokens=limit)
    print(f"{model:>9}  {' '.join(turn.text.split())}")
    print(f"{'':9}  {turn.encoded_tokens} tokens encoded, {turn.cached_tokens} from the cache")
    return turn


def before_answer(context: Context, turn: Turn) -> Context:
    """A fork of the context in which the last turn's answer is yet to be written. It shares the cache."""
    return context.fork().rollback(len(context.token_ids) - len(turn.token_ids))


def work(team: icarus.Specialists, columns: str, question: str, limit: int) -> None:
    """Plan, query and explanation of one question."""
    context = team.context().append([{"role": "system", "content": "You query one table."}])
    ask(context, "planner", f"Columns: {columns}\nQuestion: {question}", limit)
    query = ask(context, "sql", "Write the SQL.", limit)

    # How likely is this query to each of them? The text is encoded once for all.
    scores = before_answer(context, query).score(query.text or " ")
    print(f"{'':9}  its log-probability:", ", ".join(f"{name} {sum(each):.1f}" for name, each in scores.items()))

    # The base model in the place of a specialist: same context, same cache, another decoder.
    other = before_answer(context, query).generate("base", max_new_tokens=limit)
    print(f"{'base':>9}  {' '.join(other.text.split())}")

    ask(context, "explainer", f"Columns: {columns}\nQuery: {query.text}\nWhat does it ask?", limit)
    print(f"\n{context.length} tokens, {context.kv_bytes / 1e6:.1f} MB of K/V, one copy for {len(team.names)} models")


def main() -> None:
    """Read the question, and let the team work on it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--columns", nargs="+", default=COLUMNS, help="of the table that is asked about")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--base", default=icarus.PREPARED, help="hub id or folder (default: that of the shipped ones)")
    parser.add_argument("--specialist", action="append", metavar="NAME=PATH", help="planner, sql and explainer")
    parser.add_argument("--limit", type=int, default=48, help="most tokens of a turn (default: 48)")
    options = parser.parse_args()

    specialists = dict(item.split("=", 1) for item in options.specialist or ()) or icarus.shipped()
    team = icarus.Specialists.load(options.base, specialists)
    work(team, ", ".join(options.columns), options.question, options.limit)


if __name__ == "__main__":
    main()
