"""`stallfree reproduce` as a user sees it."""

import json


def test_reproduce_prints_a_part(stallfree, tmp_path):
    code, out, _ = stallfree("reproduce", "sarathi", "--only", "chunking", "--plots", str(tmp_path / "new" / "plots"))
    assert 0 == code
    assert "published" in out
    assert "errors: median" in out
    assert ["the_price_of_chunks.png"] == [file.name for file in (tmp_path / "new" / "plots").iterdir()]
    answer = json.loads(stallfree("reproduce", "sarathi", "--only", "chunking", "--json")[1])
    assert 12 == len(answer["tables"]["The price of chunks: Yi-34B"])


def test_reproduce_names_its_mistakes(stallfree, tmp_path):
    code, _, err = stallfree("reproduce", "sarathi", "--only", "chunking", "--engine", "fast")
    assert (2, 1) == (code, err.count("\n"))
    assert "unknown engine 'fast'" in err
    (tmp_path / "file").touch()
    code, _, err = stallfree("reproduce", "sarathi", "--only", "chunking", "--plots", str(tmp_path / "file" / "plots"))
    assert (2, True) == (code, "cannot be made: Not a directory" in err)
