"""Parts that a spec names: found, checked and digested, with the reason where they cannot be."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from ksweep.utils.errors import SpecError
from ksweep.utils.imports import digest_of_named, is_dotted_name, load_named, source_digest

SOURCE = "class Reader:\n    width = 3\n    def read(self): ...\nclass Stated(Reader):\n    digest = 'v7'\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "own_reader.py").write_text(SOURCE)
    (tmp_path / "own_broken.py").write_text("import surely_not_installed\n")
    (tmp_path / "own_raising.py").write_text("1 / 0\n")
    for name in ("own_reader", "own_broken", "own_raising"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_reader"


def test_named_object_is_imported_from_the_current_directory(module: str) -> None:
    named = load_named(f"{module}:Reader", "autoencoder.ar", ("width", "read"))
    assert (named.__name__, named.width) == ("Reader", 3)


@pytest.mark.parametrize(
    ("source", "reasons"),
    [
        (
            "no_such_module_here:Reader",
            ["autoencoder.ar=no_such_module_here:Reader", "no module 'no_such_module_here'", "PYTHONPATH"],
        ),
        ("own_reader.deeper:Reader", ["own_reader.deeper"]),
        ("own_reader:Raeder", ["no 'Raeder'", "Reader, Stated"]),
        ("own_broken:Reader", ["surely_not_installed", "missing"]),
        ("own_raising:Reader", ["ZeroDivisionError"]),
        ("own_reader:Reader", ["has no reconstruct", "read, reconstruct"]),
        ("own_reader.Reader", ["package.module:name"]),
    ],
)
def test_part_that_cannot_be_used_is_refused_with_the_reason(module: str, source: str, reasons: list[str]) -> None:
    with pytest.raises(SpecError) as refused:
        load_named(source, "autoencoder.ar", ("read", "reconstruct"))
    assert all(reason in str(refused.value) for reason in reasons)


def test_digest_is_the_stated_one_or_that_of_the_source_file(module: str) -> None:
    expected = hashlib.sha256(SOURCE.encode()).hexdigest()[:32]
    assert source_digest("own_reader:Reader", "f") == expected
    assert digest_of_named("own_reader:Reader", load_named("own_reader:Reader", "f"), "f") == expected
    assert digest_of_named("own_reader:Stated", load_named("own_reader:Stated", "f"), "f") == "v7"


@pytest.mark.parametrize("digest", ["", 7])
def test_stated_digest_must_be_a_text(module: str, digest: object) -> None:
    named = type("Odd", (), {"digest": digest})
    with pytest.raises(SpecError, match="digest"):
        digest_of_named("own_reader:Odd", named, "f")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.b:C", True),
        ("a:c", True),
        ("owner/name", False),
        ("owner/name:config", False),
        ("/a/b", False),
        ("C:\\x", False),
        (None, False),
    ],
)
def test_dotted_names_are_neither_paths_nor_hub_ids(source: str | None, expected: bool) -> None:
    assert is_dotted_name(source) is expected
