"""A model's recommended sampling is read from its files; a value that is not allowed is named."""

import json
from pathlib import Path

import pytest

from stallfree.checkpoint import CheckpointError
from stallfree.checkpoint.generation import recommended


def folder(path: Path, values: object) -> Path:
    (path / "generation_config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        (
            {"temperature": 0.7, "repetition_penalty": 1.05, "min_p": 0},
            {"temperature": 0.7, "repetition_penalty": 1.05, "min_p": 0},
        ),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0, "top_p": 0.9}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"top_k": -1, "temperature": 1}, {"top_k": 0, "temperature": 1}),
        ({"temperature": None, "top_p": None, "max_new_tokens": 2048, "eos_token_id": [1, 2]}, {}),
        ({}, {}),
    ],
)
def test_a_folders_recommendation_is_read(tmp_path, values, expected):
    assert expected == recommended(folder(tmp_path, values), None)


def test_a_folder_without_one_recommends_nothing(tmp_path):
    assert {} == recommended(tmp_path, None)


def test_a_gguf_files_recommendation_is_read(tmp_path):
    metadata = {
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 40,
        "general.sampling.penalty_repeat": 1.1,
        "general.name": "x",
    }
    assert {"temperature": 0.5, "top_k": 40, "repetition_penalty": 1.1} == recommended(tmp_path / "m.gguf", metadata)
    assert {} == recommended(tmp_path / "m.gguf", {})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": "hot"}, "temperature is 'hot', expected a number from 0 on"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a number from 0 to 1"),
        ({"top_k": True}, "top_k is True"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ('{"temperature": NaN}', "temperature is nan"),
        ("[]", "expected a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_recommendation_that_cannot_be_is_named_with_its_file(tmp_path, values, says):
    with pytest.raises(CheckpointError, match=f"generation_config.json: {says}"):
        recommended(folder(tmp_path, values), None)
