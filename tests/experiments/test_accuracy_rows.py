"""Rows that are drawn from the source of the data sets."""

from __future__ import annotations

from experiments.accuracy.more_rows import rows


def test_a_row_is_written_as_the_data_sets_have_it() -> None:
    """Entries of the source, and what the data sets made of them."""
    sentence = {"question-split": "dev", "table-id": "1-10015132-11"}
    entries = [
        {
            "sql": ["SELECT TABLEalias0.SCHOOL/CLUB_TEAM_FIELD FROM TABLE AS TABLEalias0 WHERE NO._FIELD = var0 ;"],
            "sentences": [
                sentence | {"original": "What school did player number 21 play for? ", "variables": {"var0": "21"}}
            ],
        },
        {
            "sql": [
                "SELECT COUNT TABLEalias0.PLAYER_FIELD FROM TABLE AS TABLEalias0 WHERE TABLEalias0.TEAM_FIELD = var0 ;"
            ],
            "sentences": [sentence | {"original": "How many of Vanderbilt?", "variables": {"var0": "vanderbilt"}}],
        },
    ]
    columns = ["PLAYER", "SCHOOL/CLUB_TEAM", "TEAM"]  # the source does not say NO. of its table
    assert list(rows(entries)) == [
        {
            "id": "wikisql-0",
            "split": "dev",
            "table_id": "1-10015132-11",
            "question": "What school did player number 21 play for?",
            "sql": "SELECT SCHOOL/CLUB_TEAM FROM t WHERE NO. = 21 ;",
            "columns": columns,
        },
        {
            "id": "wikisql-1",
            "split": "dev",
            "table_id": "1-10015132-11",
            "question": "How many of Vanderbilt?",
            "sql": 'SELECT COUNT PLAYER FROM t WHERE TEAM = "vanderbilt" ;',
            "columns": columns,
        },
    ]
