"""Measurements as commands print them."""

from stallfree.cli.measuring import print_grid


def test_a_table_is_printed_whole_where_it_is_wider_than_what_it_is_written_to(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = [["", "requests/s"], ["x" * 90, "1" * 90]]
    print_grid(rows)
    out = capsys.readouterr().out.splitlines()
    assert 2 == len(out)
    assert "x" * 90 in out[1]
    assert "1" * 90 in out[1]
