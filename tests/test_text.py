"""Tables for people: inside their width, every cell there, columns of a group on one page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cil import text

HEADER = ["task", *(f"layer {i}\n{kind}" for i in range(3) for kind in ("CIL", "joint"))]
ROWS = [[str(task), *(f"{task}.{i}00 ±0.01" for i in range(6))] for task in range(2)]


def test_all_columns_beside_each_other_where_they_fit():
    lines = text.table(HEADER, ROWS, left=0, width=100).split("\n")
    assert lines[0].split() == [word for i in "001122" for word in ("layer", i)]
    assert lines[1].split() == ["task", *["CIL", "joint"] * 3] and len(lines) == 4
    assert lines[2].split() == ["0", *(word for i in range(6) for word in (f"0.{i}00", "±0.01"))]


def test_what_does_not_fit_goes_below_with_its_group_and_the_first_column():
    pages = text.table(HEADER, ROWS, left=0, together=2, width=60).split("\n\n")
    assert [page.split("\n")[1].split() for page in pages] == [
        ["task", *["CIL", "joint"] * 2],
        ["task", "CIL", "joint"],
    ]
    assert all(page.split("\n")[3].split()[0] == "1" for page in pages)
    assert all(len(line) <= 60 for page in pages for line in page.split("\n"))


def test_a_long_text_is_broken_and_nothing_else():
    rows = [
        ["0", "blocks.0.attn", "skipped: only class or task tokens are queries: there is no attention between patches"]
    ]
    shown = text.table(["layer", "name", "status"], rows, left=3, width=60)
    assert all(len(line) <= 60 for line in shown.split("\n")) and shown.split("\n")[1].startswith(
        "0      blocks.0.attn  skipped"
    )
    assert "".join(shown.split()).endswith("".join(rows[0][2].split())[-20:])


def test_markup_and_wide_letters_are_text():
    shown = text.table(["run", "value"], [["[red]run[/red] :smile:", "1"], ["模型", "22"]], width=60)
    assert "[red]run[/red] :smile:" in shown and "模型" in shown


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 3), st.integers(20, 120), st.integers(0, 3),
)  # fmt: skip
def test_no_line_is_wider_and_no_cell_is_lost(sizes, together, width, count):
    sizes = [min(size, width - 6) for size in sizes]
    header = ["k", *("h" * size for size in sizes)]
    rows = [["k", *(str(i % 10) * size for i, size in enumerate(sizes))] for _ in range(count)]
    shown = text.table(header, rows, together=1 if sum(sizes) > width - 30 else together, width=width)
    assert all(len(line) <= width for line in shown.split("\n"))
    for row in rows:
        assert all(cell in shown for cell in row)


def test_sentences_are_wrapped_but_paths_are_not_cut():
    path = "runs/" + "a" * 100 + "/table.csv"
    assert text.prose(f"wrote {path}", 40).split("\n") == ["wrote", path]
    assert text.prose("one two\nthree", 5) == "one\ntwo\nthree"


@pytest.mark.parametrize(("terminal", "wide", "expected"), [(False, 200, 80), (True, 200, 200), (True, 40, 40)])
def test_width_is_the_terminals_or_80_on_a_pipe(terminal, wide, expected, monkeypatch):
    monkeypatch.setattr(text.sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", str(wide))
    assert text.columns() == expected
