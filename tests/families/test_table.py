"""The table of supported families in the docs is what their small models do."""

from __future__ import annotations

from tests.families.table import PAGE, parts, table


def test_the_table_of_the_docs_is_what_was_measured() -> None:
    written, measured = parts(PAGE.read_text("utf-8"))[1], table()
    again = "write it again with python -m tests.families.table"
    assert written.splitlines() == measured.splitlines(), again
