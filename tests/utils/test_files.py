"""Paths, digests and files that are whole or absent."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ksweep import Activations, Autoencoder
from ksweep.activations.datasets import text_format
from ksweep.activations.vector_files import vector_paths
from ksweep.activations.vector_source import read_vectors_sidecar
from ksweep.autoencoder.family import family_of
from ksweep.autoencoder.nla.whitening import WhiteningStated, find_statistics
from ksweep.utils import files, hub
from ksweep.utils.errors import CheckpointError, RequestError
from ksweep.utils.files import locked


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / ".cache" / "ksweep"))
    return tmp_path / ".cache" / "ksweep"


def test_digest_follows_content_and_names_not_place_or_time(tmp_path: Path) -> None:
    for name in ("a", ".cache/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "README.md").write_text(name)
    a, b = tmp_path / "a", tmp_path / ".cache" / "b"
    assert hub.content_digest(a) == hub.content_digest(b)
    (b / "config.json").write_text("{ }")
    assert hub.content_digest(a) != hub.content_digest(b)
    (a / "config.json").rename(a / "other.json")
    (b / "config.json").write_text("{}")
    assert hub.content_digest(a) != hub.content_digest(b)


def test_a_file_rewritten_with_its_old_size_and_time_gets_a_new_digest(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"aaaa")
    before, stat = hub.content_digest(path), path.stat()
    path.write_bytes(b"bbbb")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hub.content_digest(path) != before


def test_a_digest_is_remembered_and_a_spoiled_memory_is_not_believed(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"x")
    value = hub.content_digest(path)
    [note] = (own_home / "digests").iterdir()
    whole = note.read_text()
    monkeypatch.setattr(hub.hashlib, "file_digest", None)
    assert hub.content_digest(path) == value, "not read again"
    monkeypatch.undo()
    monkeypatch.setenv("KSWEEP_HOME", str(own_home))
    wrong = [whole[:i] + ("0" if whole[i] != "0" else "1") + whole[i + 1 :] for i in (*range(0, len(whole), 7), len(whole) - 1)]
    for text in ("rubbish", "", whole[:-1], whole[:64] + "\n", "0" * 64 + whole[64:], *wrong):
        note.write_text(text)
        caplog.clear()
        assert hub.content_digest(path) == value
        assert caplog.text.count(f"{note} is damaged") == 1 and note.read_text() == whole
    note.write_bytes(b"\xff\x00")
    assert hub.content_digest(path) == value


def test_an_entry_of_an_earlier_version_is_digested_again_without_a_word_and_gets_its_checksum(
    tmp_path: Path, own_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"x")
    value = hub.content_digest(path)
    [note] = (own_home / "digests").iterdir()
    whole = note.read_text()
    note.write_text("0" * 64)  # it may have been damaged before there were checksums
    assert hub.content_digest(path) == value and note.read_text() == whole
    note.unlink()
    note.mkdir()
    assert hub.content_digest(path) == value
    assert "w.bin" not in caplog.text


def test_a_directory_without_model_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model files"):
        hub.content_digest(tmp_path)


@pytest.mark.parametrize(
    ("source", "words"), [("./no/where", "existing path, or a hub id"), ("a b", "hub id"), ("/x/y/z", "relative path")]
)
def test_a_source_that_is_neither_path_nor_hub_id_is_told_so(source: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        hub.resolve(source)


def test_the_demo_base_that_is_not_there_yet_is_told_how_to_get_it(own_home: Path) -> None:
    with pytest.raises(CheckpointError, match="make demo-model"):
        hub.resolve(str(own_home / "models" / "smollm2"))


def test_a_hub_id_that_cannot_be_had_offline_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="neither a local path nor available from the model hub"):
        hub.resolve("nobody/nothing", "AV checkpoint")


def test_publish_leaves_nothing_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "f.json"
    files.publish(target, b"old")

    def fails(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no"):
        files.publish(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"] and target.read_bytes() == b"old"


def test_digest_leaves_out_what_datasets_caches_beside_its_data(tmp_path: Path) -> None:
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"rows")
    before = hub.content_digest(tmp_path)
    (tmp_path / "cache-1f3a.arrow").write_bytes(b"left by a map over the rows")
    assert hub.content_digest(tmp_path) == before


HOLDER = """import sys; from pathlib import Path; from ksweep.utils.files import locked
with locked(Path(sys.argv[1]), "it"):
    print(1, flush=True)
    input()
"""


@pytest.fixture
def held_lock(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A lock that another process holds."""
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "1\n"
    yield path, holder
    holder.kill()
    holder.communicate()


def test_locked_is_waited_for_and_says_so_once_and_a_dead_holder_holds_nothing(
    held_lock: tuple[Path, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, holder = held_lock
    killer = threading.Timer(0.3, holder.kill)  # some six looks at the lock later
    killer.start()
    with locked(path, "another command", aloud=True) as held:
        assert held and holder.wait(0.1) == -signal.SIGKILL
    killer.join()
    assert capsys.readouterr().err == f"another command is at work in {path.parent}: waiting for it\n"


def test_locked_is_free_again_after_its_body(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "lock", "it", patience=0.0) as held:
            assert held


def test_locked_goes_on_beside_a_holder_after_its_patience(
    held_lock: tuple[Path, subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with locked(held_lock[0], "another ingester", patience=0.1) as held:
        assert not held
    assert "another ingester has held" in caplog.text


def test_locked_raises_where_the_file_cannot_be_written(tmp_path: Path) -> None:
    # Stands for a registry of another user: tests run as root, whom permissions do not stop.
    (tmp_path / "lock").mkdir()
    with pytest.raises(IsADirectoryError), locked(tmp_path / "lock", "another command"):
        pytest.fail("what needs the lock was begun")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_locked_where_the_file_system_has_no_locks_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):
        with locked(tmp_path / "lock", "another command") as held:
            assert not held
    [record] = caplog.records
    assert f"{tmp_path} cannot be locked ({os.strerror(number)})" in record.message


@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser/x"])
@pytest.mark.parametrize(
    "use",
    [
        hub.resolve,
        lambda name: family_of(Autoencoder(checkpoint=name)).located,
        lambda name: family_of(Autoencoder(av=name, ar=name)).draws_identity(),
        lambda name: family_of(Autoencoder(texts=name, ar="ar")).draws_identity(),
        lambda name: text_format(Activations(model="m", text=name)),
        lambda name: vector_paths(name),
        lambda name: read_vectors_sidecar(name),
        lambda name: find_statistics(WhiteningStated(None, "0" * 64), Path("."), name, 32),
    ],
    ids=["model", "talkative", "pair", "texts", "text", "vectors", "sidecar", "whitening"],
)
def test_name_that_no_file_can_have_is_refused_in_a_sentence(use: Callable[[str], object], name: str) -> None:
    with pytest.raises(RequestError, match="cannot name a file"):
        use(name)
