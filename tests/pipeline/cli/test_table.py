"""Tables in the log."""

from __future__ import annotations

from pipeline.cli import table

COLUMNS = (table.text("model"), table.number("MACs", "{:,.1f} M"), table.text("source", width=8))


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_are_flush_right() -> None:
    rows = [("swin", 1234.56, "timm"), ("a longer name", None, "")]
    assert table.lines(COLUMNS, rows) == [
        "model               MACs  source",
        "swin           1,234.6 M  timm",
        "a longer name          -",
    ]


def test_rows_that_come_one_by_one_line_up_by_the_widths_of_their_columns() -> None:
    columns = (table.text("model", width=6), table.number("n", width=4))
    heading = table.lines(columns, [])
    assert heading == ["model      n"]
    assert [table.lines(columns, [row])[1] for row in (("a", 1), ("b", 1000))] == ["a          1", "b       1000"]


def test_a_table_can_be_indented() -> None:
    assert table.lines((table.text("x"),), [("y",)], indent="  ") == ["  x", "  y"]
