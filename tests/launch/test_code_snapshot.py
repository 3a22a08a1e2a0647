"""The code that jobs run: tracked files and new ones, once per commit and difference, whole or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ksweep.launch import code_snapshot
from ksweep.utils.errors import RunError


def git(tree: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b", *words], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "package").mkdir(parents=True)
    (tree / "package" / "__init__.py").write_text("one = 1\n")
    (tree / "data.bin").write_bytes(bytes(range(256)))
    (tree / ".gitignore").write_text("ignored/\n")
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", "first")
    return tree


def taken(tree: Path, tmp_path: Path) -> code_snapshot.CodeSnapshot:
    code = code_snapshot.snapshot_code(tmp_path / "logs", tree / "package")
    assert code is not None
    return code


def test_a_clean_tree_is_copied_once_under_its_commit(tree: Path, tmp_path: Path) -> None:
    first = taken(tree, tmp_path)
    assert first.diff is None and first.commit == git(tree, "rev-parse", "HEAD").strip()
    assert (first.path / "data.bin").read_bytes() == bytes(range(256))
    stamp = (first.path / "package" / "__init__.py").stat().st_ino
    assert taken(tree, tmp_path) == first and (first.path / "package" / "__init__.py").stat().st_ino == stamp


def test_changes_and_new_files_are_in_the_copy_and_ignored_ones_are_not(tree: Path, tmp_path: Path) -> None:
    clean = taken(tree, tmp_path)
    (tree / "package" / "__init__.py").write_text("one = 2\n")
    (tree / "package" / "fresh file.py").write_text("new = True\n")
    (tree / "ignored").mkdir()
    (tree / "ignored" / "weights").write_text("large")
    changed = taken(tree, tmp_path)
    assert changed.path != clean.path and not (changed.path / "ignored").exists()
    assert (changed.path / "package" / "__init__.py").read_text() == "one = 2\n"
    assert (changed.path / "package" / "fresh file.py").read_text() == "new = True\n"
    assert (clean.path / "package" / "__init__.py").read_text() == "one = 1\n"


def test_the_kept_difference_makes_the_copy_from_the_commit(tree: Path, tmp_path: Path) -> None:
    (tree / "package" / "__init__.py").write_text("one = 3\n")
    (tree / "new.py").write_text("x = 1\n")
    (tree / "data.bin").write_bytes(b"\0\1\2")
    code = taken(tree, tmp_path)
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(tree), str(other))
    git(other, "apply", str(code.diff))
    for name in ("package/__init__.py", "new.py", "data.bin"):
        assert (other / name).read_bytes() == (code.path / name).read_bytes()


def test_a_copy_without_its_marker_is_made_again(tree: Path, tmp_path: Path) -> None:
    code = taken(tree, tmp_path)
    code.path.with_name(f"{code.path.name}.json").unlink()
    (code.path / "package" / "__init__.py").write_text("half")
    assert (taken(tree, tmp_path).path / "package" / "__init__.py").read_text() == "one = 1\n"


def test_logs_inside_the_tree_are_not_part_of_the_copy(tree: Path) -> None:
    first = code_snapshot.snapshot_code(tree / "logs", tree / "package")
    second = code_snapshot.snapshot_code(tree / "logs", tree / "package")
    assert first is not None and first == second and first.diff is None and not (first.path / "logs").exists()


def test_a_deleted_file_is_missing_in_the_copy(tree: Path, tmp_path: Path) -> None:
    (tree / "data.bin").unlink()
    assert not (taken(tree, tmp_path).path / "data.bin").exists()


def test_data_that_git_is_not_told_to_ignore_is_refused_by_name(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_snapshot, "MAX_UNTRACKED_BYTES", 1000)
    (tree / "vectors.arrow").write_bytes(bytes(2000))
    with pytest.raises(RunError, match=r"vectors\.arrow.*\.gitignore"):
        taken(tree, tmp_path)


def test_an_installed_package_has_no_snapshot(tree: Path, tmp_path: Path) -> None:
    (tree / "ignored" / "site").mkdir(parents=True)
    (tree / "ignored" / "site" / "__init__.py").write_text("")
    assert code_snapshot.snapshot_code(tmp_path / "logs", tree / "ignored" / "site") is None
    assert code_snapshot.snapshot_code(tmp_path / "logs", tmp_path) is None
