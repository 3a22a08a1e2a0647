"""Values that a parser made of somebody else's file: what is out of bounds is refused, whatever sharing hides it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.files import LARGEST_JSON, json_lines, read_json
from ksweep.utils.plain_values import MOST_LEVELS, PlainValueError, bounded_json, check_plain
from ksweep.utils.sidecar_keys import read_yaml


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def shared(levels: int) -> Any:
    value: Any = ["x"] * 10
    for _ in range(levels - 1):
        value = [value] * 10
    return value


def cycle() -> Any:
    value: dict[str, Any] = {}
    value["a"] = [value]
    return value


OUT_OF_BOUNDS: dict[str, tuple[Any, str]] = {
    "levels": (nested(MOST_LEVELS + 1), "levels deep"),
    "many levels": (nested(100_000), "levels deep"),
    "levels that are shared": ([nested(40), {"x": [nested(40)] * 2, "y": [[[[nested(60)]]]]}], "levels deep"),
    "repeats": (shared(7), "stands for more than"),
    "repeats of repeats": (shared(50), "stands for more than"),
    "a cycle": (cycle(), "contains itself"),
    "digits": ({"a": [1 << 256]}, "257 bits"),
    "digits as a key": ({-(1 << 4000): 1}, "4001 bits"),
    "half a character": ({"a": "x\ud800"}, "surrogate"),
    "half a character as a key": ({"\udfff": 1}, "surrogate"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "reason"), OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_value_out_of_bounds_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(PlainValueError, match=reason):
        check_plain(value)


@pytest.mark.parametrize("value", [nested(MOST_LEVELS), shared(6), {"a": ["é😀", 1 << 255, -1.5, None, (1, {2})]}, "x", {}])
def test_value_within_bounds_is_passed(value: Any) -> None:
    """10^6 leaves in 111,111 lists, 64 levels, 256 bits: the last values that are allowed."""
    check_plain(value)


JSON = {
    "20,000 brackets": (b'{"a": ' + b"[" * 20_000, "levels deep"),
    "20,000 objects": (b'{"a": ' * 20_000, "levels deep"),
    "100 brackets": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "levels deep"),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "5,000 digits"),
    "100 digits": (b'{"a": -' + b"9" * 100 + b"}", "101 digits"),
    "half a surrogate pair": (b'{"text": "a \\ud83d b"}', "surrogate pair"),
    "half a surrogate pair as a key": (b'{"\\uDE00": 1}', "surrogate pair"),
    "a surrogate in bytes": (b'{"text": "\xed\xa0\x80"}', "UTF-8|utf-8"),
    "other bytes": (b'{"text": "\xff"}', "UTF-8|utf-8"),
    "no JSON": (b'{"text": ', "JSON"),
}


@pytest.mark.parametrize(("data", "reason"), JSON.values(), ids=JSON)
def test_hostile_json_is_refused_with_its_file(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_json(tmp_path / "x.json", "weight index")
    assert str(tmp_path / "x.json") in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(("data", "reason"), JSON.values(), ids=JSON)
def test_hostile_line_of_json_is_refused_with_its_number(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n\n' + data + b"\n")
    rows = json_lines(tmp_path / "x.jsonl")
    assert next(rows) == {"text": "good"}
    with pytest.raises(DataError, match=reason) as caught:
        next(rows)
    assert f"line 3 of {tmp_path / 'x.jsonl'}" in str(caught.value) and len(str(caught.value)) < 500


def test_a_large_file_of_json_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    with pytest.raises(CheckpointError, match="more than 32 MB"):
        read_json(tmp_path / "x.json", "weight index")


def test_a_whole_pair_and_long_fractions_are_read() -> None:
    text = {"text": "😀", "x": 0.1, "ids": list(range(1000)), "deep": [[[]]]}
    assert bounded_json(json.dumps(text).encode()) == text
    assert bounded_json(b"\xef\xbb\xbf" + b"0." + b"3" * 200) == pytest.approx(1 / 3)


YAML = {
    "merged to the tenth power": "\n".join(
        ["a0: &a0 {k: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 11))]
    ),
    "merged often": f"a: &a {{k: 1}}\nb: {{<<: [{', '.join(['*a'] * 10_000)}]}}",
    "a number to the base of 60": "a: " + ":".join(["1"] * 200_000),
    "a fraction to the base of 60": "a: " + ":".join(["1"] * 200_000) + ".5",
    "64 brackets": "a: " + "[" * 64 + "]" * 64,
    "20,000 brackets": "a: " + "[" * 20_000,
    "levels by indentation": "\n".join(" " * i + "a:" for i in range(70)),
    "5,000 digits": "a: " + "9" * 5000,
    "no truth value": "a: !!bool maybe",
    "no number": "a: !!int ''",
    "no time": "a: !!timestamp x",
    "a month too many": "a: 2026-13-01",
    "a float of letters": "a: !!float x",
    "an unknown alias": "a: *b",
    "a key that is a list": "? [1]\n: 2",
    "bytes": "a: !!binary 'é'",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_hostile_yaml_is_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(DataError, match=r"x\.yaml cannot be read as YAML") as caught:
        read_yaml(tmp_path / "x.yaml", DataError)
    assert len(str(caught.value)) < 500


def test_yaml_of_some_levels_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: " + "[" * 60 + "]" * 60)
    assert str(read_yaml(tmp_path / "x.yaml", DataError)) == "{'a': " + "[" * 60 + "]" * 60 + "}"


def test_merge_keys_of_a_sidecar_give_what_yaml_says(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  <<: [*b, *a]\n  z: 5\n"
    (tmp_path / "x.yaml").write_text(text)
    assert read_yaml(tmp_path / "x.yaml", DataError) == yaml.safe_load(text)
