"""The code that jobs run: tracked files and new code, once per commit and difference, whole or not at all; no secrets."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ksweep.config.resources import Resources
from ksweep.launch import code_snapshot
from ksweep.utils.errors import RunError, SpecError
from ksweep.utils.provenance import git_state, provenance


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
    (tree / "data.bin").write_bytes(b"\0\1\2")
    code = taken(tree, tmp_path)
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(tree), str(other))
    git(other, "apply", str(code.diff))
    for name in ("package/__init__.py", "data.bin"):
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
    (tree / "vectors.arrow").write_bytes(bytes(2000))  # not within a package: it stays where it is
    assert not (taken(tree, tmp_path).path / "vectors.arrow").exists()
    (tree / "package" / "vectors.arrow").write_bytes(bytes(2000))
    with pytest.raises(RunError, match=r"vectors\.arrow.*\.gitignore"):
        taken(tree, tmp_path)


def test_an_installed_package_has_no_snapshot(tree: Path, tmp_path: Path) -> None:
    (tree / "ignored" / "site").mkdir(parents=True)
    (tree / "ignored" / "site" / "__init__.py").write_text("")
    assert code_snapshot.snapshot_code(tmp_path / "logs", tree / "ignored" / "site") is None
    assert code_snapshot.snapshot_code(tmp_path / "logs", tmp_path) is None


SECRETS = (
    ".env", "package/.env", ".env.local", "package/.cache/answer.py", "server.pem", "package/server.pem", "package/id_ed25519",
    "package/credentials.json", "package/tokens.txt", "package/prod.env", "notes.txt", "package.d/key.py.swp",
)  # fmt: skip
SECRET = "hf_" + "Kq7" * 10


def test_secrets_in_new_files_reach_no_file_of_the_snapshot(tree: Path, tmp_path: Path) -> None:
    for name in SECRETS:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"HF_TOKEN={SECRET}\n")
        (tree / name).chmod(0o600)
    (tree / "package" / "__init__.py").write_text("one = 2\n")
    code = taken(tree, tmp_path)
    written = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert code.new == () and code.num_left_out == len(SECRETS)
    assert code.diff is not None and b"one = 2" in code.diff.read_bytes()
    assert json.loads(code.path.with_name(f"{code.path.name}.json").read_text())["left_out"] == len(SECRETS)


def test_new_modules_and_data_of_packages_are_copied_and_named(tree: Path, tmp_path: Path) -> None:
    new = ("package/data/words.json", "package/fresh.py", "scripts/tokens.py")
    for name in new:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("1")
    clean_key = git(tree, "rev-parse", "HEAD")[:12]
    code = taken(tree, tmp_path)
    assert code.new == new and all((code.path / name).read_text() == "1" for name in new)
    assert code.diff is None and code.path.name.startswith(clean_key)
    (tree / "package" / "fresh.py").write_text("2")
    again = taken(tree, tmp_path)
    assert again.path != code.path and (again.path / "package" / "fresh.py").read_text() == "2"
    assert (code.path / "package" / "fresh.py").read_text() == "1"


def test_a_copy_and_its_difference_are_not_more_readable_than_the_tree(tree: Path, tmp_path: Path) -> None:
    (tree / "package" / "private.py").write_text("x = 1\n")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", "second")
    (tree / "package" / "private.py").write_text("x = 2\n")
    (tree / "package" / "private.py").chmod(0o600)
    (tree / "package").chmod(0o750)
    tree.chmod(0o700)
    code = taken(tree, tmp_path)
    assert code.diff is not None
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (code.path, code.path / "package", code.diff)}
    assert list(modes.values()) == [0o700, 0o750, 0o600]
    assert stat.S_IMODE((code.path / "package" / "private.py").stat().st_mode) == 0o600


def test_another_repository_within_the_checkout_is_left_out(tree: Path, tmp_path: Path) -> None:
    inner = tree / "package" / "vendored"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "module.py").write_text("x = 1\n")
    assert git(tree, "ls-files", "--others") == "package/vendored/\n"
    code = taken(tree, tmp_path)
    assert (code.new, code.num_left_out) == ((), 1) and git_state(tree)[1] is False


@pytest.mark.parametrize(("name", "dirty"), [("package/fresh.py", True), (".env", False), ("notes.txt", False)])
def test_a_checkout_with_new_code_differs_from_its_commit(tree: Path, name: str, dirty: bool) -> None:
    commit = git(tree, "rev-parse", "HEAD").strip()
    assert git_state(tree) == (commit, False)
    (tree / name).write_text("x = 1\n")
    assert git_state(tree / "package") == (commit, dirty)


@pytest.mark.parametrize(
    ("word", "recorded"),
    [
        (f"resources.setup=export HF_TOKEN={SECRET}", "resources.setup=export HF_TOKEN=***"),
        ("text=https://me:s3cret@example.com/a", "text=https://***@example.com/a"),
        ("text=https://me:s3@cret@example.com/a", "text=https://***@example.com/a"),
        (f"x=sk-proj-{'aB3-' * 10}", "x=***"),
        ("experiments/sk-learn-baseline-for-the-comparison-of-all.py",) * 2,
        ("setup=export https_proxy=http://$PROXY_USER:$PROXY_PASSWORD@proxy:3128",) * 2,
        ("setup=docker://ubuntu:22.04@sha256:5f1b",) * 2,
        (
            "av=/data/hf_models_of_a_colleague_of_mine/disk-of-long-names",
            "av=/data/hf_models_of_a_colleague_of_mine/disk-of-long-names",
        ),
    ],
)
def test_tokens_on_a_command_line_are_not_recorded(word: str, recorded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["temp_sweep.py", word])
    assert provenance()["argv"] == ["temp_sweep.py", recorded]


@pytest.mark.parametrize("field", [{"setup": f"export HF_TOKEN={SECRET}"}, {"extra": {"export": f"ALL,HF_TOKEN={SECRET}"}}])
def test_a_token_that_would_lie_in_the_batch_script_is_refused_without_repeating_it(field: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="token") as refused:
        Resources(**field)
    assert SECRET not in str(refused.value)
