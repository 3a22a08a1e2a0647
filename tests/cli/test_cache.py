"""`ksweep cache ...` as it is typed, on real stores: what it says, what it exits with, what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ksweep.activations import ActivationStore, ensure, maintenance
from ksweep.config.spec import Activations
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.run_record import write_run
from ksweep.registry.work_units import WorkUnit
from tests.activations.helpers import passages, random_vectors, shard_files, vector_spec, write_jsonl, write_vectors
from tests.activations.test_store import flip_a_byte, make_unit
from tests.cli.conftest import Command
from tests.registry.landed_runs import curve_of, publish_draws, record_of
from tests.stored_rows import publish_unit, rows_of
from tests.tiny_models import make_base

ROOT = Path(__file__).parents[2]
HOUR, DAY = 3600, 86400


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A cache of three keys: "text" of a tiny model, "short" and "long" files of vectors."""
    place = tmp_path_factory.mktemp("filled")
    base = make_base(place / "base", "llama", num_layers=3, d_model=16)
    text = write_jsonl(place / "rows.jsonl", passages(60))
    request = Activations(
        model=str(base), text=str(text), num_activations=40, min_position=4, max_length=128, dtype="bfloat16", seed=7
    )
    keys = {"text": ensure(request, 1, place / "cache").key}
    for name, count in (("short", 10), ("long", 2500)):
        path = write_vectors(place / f"{name}.parquet", random_vectors(count))
        keys[name] = ensure(vector_spec(path, count), None, place / "cache").key
    return place, keys


@pytest.fixture
def keys(filled: tuple[Path, dict[str, str]]) -> dict[str, str]:
    return filled[1]


@pytest.fixture
def cache(filled: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    """A copy; everything in it was last used three days ago."""
    path = tmp_path / "vector_cache"
    shutil.copytree(filled[0] / "cache", path)
    age(path, 3 * DAY)
    return path


@pytest.fixture
def ksweep(cache: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`ksweep cache WORDS` beside the cache."""
    monkeypatch.chdir(cache.parent)
    return lambda *words: command("cache", *words)


def age(path: Path, seconds: float) -> None:
    """Everything below was last touched so long ago."""
    then = time.time() - seconds
    for inner in [path, *path.rglob("*")]:
        os.utime(inner, (then, then))


def objects(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def there(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


# ---- ls, show, du


def test_ls_says_of_every_key_what_it_holds(
    ksweep: Command, cache: Path, keys: dict[str, str], filled: tuple[Path, dict[str, str]]
) -> None:
    age(cache / keys["short"], 60)
    code, out, err = ksweep("ls", "--json")
    found = objects(out)
    assert (code, err) == (0, "") and found[0]["key"] == keys["short"], "the one used last comes first"
    by_key = {row["key"]: row for row in found}
    text = by_key[keys["text"]]
    assert text["model"] == str(filled[0] / "base") and text["text"] == str(filled[0] / "rows.jsonl")
    assert text["layer"] == 1 and text["positions"] == "random min_position=4 per_row=1 seed=7"
    # 60 rows of text are one unit: all of it was computed for a request of 40.
    assert (text["activations"], text["whole_source"]) == (60, True)
    assert text["bytes"] == size(cache / keys["text"])
    assert (by_key[keys["long"]]["activations"], by_key[keys["long"]]["model"]) == (2500, None)
    assert str(by_key[keys["long"]]["text"]).endswith("long.parquet")
    # touch(1) and stat(1) know the same time: three days ago, in UTC.
    assert str(text["last_used"]).startswith(time.strftime("%Y-%m-%d", time.gmtime(time.time() - 3 * DAY)))


def test_ls_in_a_pipe_is_a_table_without_escape_codes_and_whole(ksweep: Command, keys: dict[str, str]) -> None:
    code, out, _ = ksweep("ls")
    assert code == 0 and "\x1b" not in out and "…" not in out
    assert all(key[:10] in out for key in keys.values())
    assert "random min_position=4" in out and " rows.jsonl " in out and " yes " in out


def test_ls_counts_what_can_be_read_not_what_lies_behind_a_gap(ksweep: Command, cache: Path, keys: dict[str, str]) -> None:
    (cache / keys["long"] / "shard-00001.json").unlink()
    [row] = [row for row in objects(ksweep("ls", "--json")[1]) if row["key"] == keys["long"]]
    assert (row["activations"], row["whole_source"]) == (1024, False)


def test_ls_only_looks(ksweep: Command, cache: Path, keys: dict[str, str]) -> None:
    (cache / keys["long"] / "shard-00001.json").write_text("{")
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    for command in (["ls"], ["show", keys["text"]], ["du"], ["gc", "--older-than", "1d"]):
        assert ksweep(*command)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before


def test_show_prints_the_manifest_of_a_unique_prefix(ksweep: Command, cache: Path, keys: dict[str, str]) -> None:
    code, out, err = ksweep("show", keys["text"][:6])
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert (code, err) == (0, "") and lines["key"] == keys["text"] and lines["dtype"] == "bfloat16"
    assert (lines["identity.layer"], lines["norms.num_not_finite"], lines["shards"]) == ("1", "0", "1")
    [shown] = objects(ksweep("show", keys["text"], "--json")[1])
    stored = json.loads((cache / keys["text"] / "manifest.json").read_text())
    assert {name: shown[name] for name in stored} == stored


def test_show_of_a_key_that_is_unknown_or_not_unique_lists_what_there_is(
    ksweep: Command, cache: Path, keys: dict[str, str]
) -> None:
    code, out, err = ksweep("show", "zzz")
    assert (code, out) == (2, "") and all(key[:12] in err for key in keys.values()) and "'zzz'" in err
    twins = ["ab" + "0" * 30, "ab" + "1" * 30]
    for twin in twins:
        shutil.copytree(cache / keys["short"], cache / twin)
    code, out, err = ksweep("show", "ab")
    assert (code, out) == (2, "") and "2 keys" in err and all(twin[:12] in err for twin in twins)
    assert keys["text"][:12] not in err


def test_deleted_or_damaged_manifest_loses_nothing_and_is_named(
    ksweep: Command, cache: Path, keys: dict[str, str], filled: tuple[Path, dict[str, str]]
) -> None:
    manifest = cache / keys["long"] / "manifest.json"
    before = manifest.read_text()
    for damage in (manifest.unlink, lambda: manifest.write_text(before[:100])):
        damage()
        code, out, err = ksweep("show", keys["long"])
        assert code == 0 and "missing or unreadable" in err and "2500" in out
        [row] = [row for row in objects(ksweep("ls", "--json")[1]) if row["key"] == keys["long"]]
        assert (row["activations"], row["text"]) == (2500, None)
        ensure(vector_spec(filled[0] / "long.parquet", 2500), None, cache)
        assert manifest.read_text() == before


def test_du_adds_up_activations_draws_and_scores(ksweep: Command, cache: Path, keys: dict[str, str]) -> None:
    unit = WorkUnit(0, 1, 0, 2)
    publish_unit(CellDraws(Path("registry"), "d" * 32, "e" * 32), unit, rows_of(unit, error=[0.5, 0.4]))
    found = objects(ksweep("du", "--json")[1])
    draws, scores = Path("registry/draws"), Path("registry/scores")
    assert found[-1] == {"store": "all", "key": None, "bytes": size(cache) + size(draws) + size(scores)}
    by_key = {row["key"]: (row["store"], row["bytes"]) for row in found}
    assert by_key[keys["long"]] == ("activations", size(cache / keys["long"]))
    assert by_key["d" * 32] == ("draws", size(draws / ("d" * 32)))
    assert by_key[f"{'d' * 32}/{'e' * 32}"] == ("scores", size(scores))


@pytest.mark.parametrize("words", [["ls"], ["show", "a"], ["verify"], ["gc"], ["du"]])
def test_a_cache_that_is_not_there_exits_with_two_and_is_named(ksweep: Command, words: list[str]) -> None:
    code, out, err = ksweep(*words, "--vector-cache", "nowhere")
    assert (code, out) == (2, "") and "no vector cache at nowhere" in err


@pytest.mark.slow
def test_a_real_process_needs_no_torch_and_exits_with_one_over_damage(cache: Path, keys: dict[str, str]) -> None:
    flip_a_byte(next((cache / keys["long"]).glob("shard-00001-*.arrow")))
    script = """
import sys
from ksweep.cli import main

for words in (["ls"], ["gc", "--older-than", "1d"], ["du"], ["verify"]):
    sys.argv = ["ksweep", "cache", *words, "--vector-cache", sys.argv[-1]]
    try:
        main()
    except SystemExit as end:
        assert "torch" not in sys.modules
        if end.code:
            raise
"""
    words = [sys.executable, "-c", script, str(cache)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: 1 damaged shards were set aside"), done.stderr
    assert "kept: " not in done.stderr and "activations" in done.stdout


# ---- verify


def test_verify_of_a_sound_cache_says_so(ksweep: Command, keys: dict[str, str]) -> None:
    code, out, err = ksweep("verify", "--json")
    assert (code, err) == (0, "")
    assert {row["key"]: (row["shards"], row["damaged"]) for row in objects(out)} == {
        keys["text"]: (1, []), keys["short"]: (1, []), keys["long"]: (3, []),
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["flipped byte", "truncated shard", "deleted data", "damaged statement"])
def test_verify_sets_damage_aside_with_exit_code_one_and_the_next_run_computes_it_again(
    ksweep: Command, cache: Path, keys: dict[str, str], filled: tuple[Path, dict[str, str]], damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    directory = cache / keys["long"]
    expected, victim = shard_files(directory), next(directory.glob("shard-00001-*.arrow"))
    {
        "flipped byte": lambda: flip_a_byte(victim),
        "truncated shard": lambda: victim.write_bytes(victim.read_bytes()[:-1]),
        "deleted data": victim.unlink,
        "damaged statement": lambda: (directory / "shard-00001.json").write_text("{"),
    }[damage]()
    code, out, err = ksweep("verify", keys["long"][:8], "--json")
    assert code == 1 and objects(out)[0]["damaged"] == [1]
    assert "1 damaged shards were set aside" in err and "shard 1 of" in caplog.text
    assert list(directory.glob("*.damaged-*"))
    assert ksweep("verify")[0] == 0, "what is set aside is not looked at again"
    table = ensure(vector_spec(filled[0] / "long.parquet", 2500), None, cache)
    assert np.array_equal(table.vectors(), random_vectors(2500)) and shard_files(directory) == expected


# ---- gc


def test_gc_says_what_would_go_and_removes_nothing_without_yes(ksweep: Command, cache: Path, keys: dict[str, str]) -> None:
    before = there(cache)
    code, out, err = ksweep("gc", "--older-than", "2d", "--json")
    assert code == 0 and {row["key"] for row in objects(out)} == set(keys.values()) and there(cache) == before
    assert sum(row["bytes"] for row in objects(out)) == size(cache)  # type: ignore[misc]
    assert "nothing was removed: give --yes" in err


def test_gc_older_than_removes_what_was_not_used_for_so_long(ksweep: Command, cache: Path, keys: dict[str, str]) -> None:
    os.utime(cache / keys["long"] / "used", (time.time() - DAY,) * 2)  # written long ago, read yesterday
    code, out, _ = ksweep("gc", "--older-than", "2d", "--yes", "--json")
    assert code == 0 and {row["key"] for row in objects(out)} == {keys["text"], keys["short"]}
    assert there(cache) == {keys["long"]}


@pytest.mark.slow
def test_gc_keep_used_keeps_what_runs_or_draws_of_the_registry_name(ksweep: Command, cache: Path, keys: dict[str, str]) -> None:
    write_run(Path("registry"), record_of("r1", activations_key=keys["text"]), curve_of())
    write_run(Path("registry"), record_of("r2", status="failed", error_type="x", activations_key=None))
    interrupted = Path("registry/draws") / ("d" * 32)
    interrupted.mkdir(parents=True)
    (interrupted / "identity.json").write_text(json.dumps({"draws": {"activations": keys["short"]}}))
    assert ksweep("gc", "--keep-used", "--older-than", "5d", "--yes")[0] == 0 and len(there(cache)) == 3, "both must let go"
    assert ksweep("gc", "--keep-used", "--yes")[0] == 0
    assert there(cache) == {keys["text"], keys["short"]}


def test_gc_keep_used_without_a_registry_would_remove_everything_and_is_refused(
    ksweep: Command, cache: Path, keys: dict[str, str]
) -> None:
    code, out, err = ksweep("gc", "--keep-used", "--yes", "--registry", "mistyped")
    assert (code, out) == (2, "") and "check --registry" in err and len(there(cache)) == 3
    write_run(Path("registry"), record_of("r1", activations_key=keys["text"]), curve_of())
    Path("registry/landing/r1/record.json").write_text("{")
    code, _, err = ksweep("gc", "--keep-used", "--yes")
    assert code == 1 and "r1/record.json" in err and len(there(cache)) == 3


def test_gc_keeps_what_was_touched_within_the_hour_unless_forced(ksweep: Command, cache: Path, keys: dict[str, str]) -> None:
    os.utime(cache / keys["long"] / "used", (time.time() - HOUR / 2,) * 2)
    code, _, err = ksweep("gc", "--older-than", "0s", "--yes")
    assert code == 0 and f"kept: {keys['long']}" in err and there(cache) == {keys["long"]}
    assert ksweep("gc", "--older-than", "0s", "--yes", "--force")[0] == 0 and there(cache) == set()


def test_gc_without_a_condition_frees_what_crashes_left_in_both_stores(
    ksweep: Command, cache: Path, keys: dict[str, str]
) -> None:
    publish_draws(Path("registry"), "d" * 32, [[0.5, 0.4]])
    parts, long = Path("registry/draws") / ("d" * 32), cache / keys["long"]
    old = [
        long / ".shard-00009-ab.arrow.x.part", long / "shard-00000.json.damaged-20260101T000000Z",
        long / "shard-00000-0123456789abcdef.arrow", long / "shard-00007-0123456789abcdef.arrow",
        cache / ".removing-abc" / "shard-00000.json", parts / ".x.part", parts / "part-0.parquet.damaged-1",
    ]  # fmt: skip
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (time.time() - 2 * HOUR,) * 2)
    young = long / ".shard-00010-ab.arrow.x.part"
    young.write_bytes(b"being written")
    kept = {p for p in [*cache.rglob("*"), *parts.rglob("*")] if p not in old and ".removing" not in str(p)}
    code, out, err = ksweep("gc", "--json")
    assert code == 0 and [row["bytes"] for row in objects(out)] == [100] * 7 and "would free 700 B" in err
    assert all(path.exists() for path in old)
    assert ksweep("gc", "--yes")[0] == 0
    assert {*cache.rglob("*"), *parts.rglob("*")} == kept
    assert "nothing to remove" in ksweep("gc", "--yes")[2]


def test_gc_leaves_alone_what_is_not_a_key(ksweep: Command, cache: Path) -> None:
    (cache / "notes").mkdir()
    (cache / "notes" / "shard-00000.json.damaged-1").write_text("mine")
    age(cache, 3 * DAY)
    assert ksweep("gc", "--older-than", "1d", "--yes")[0] == 0
    assert there(cache) == {"notes"} and (cache / "notes" / "shard-00000.json.damaged-1").exists()


@pytest.mark.parametrize("text", ["30", "d", "-1d", "1y", "soon"])
def test_a_length_of_time_that_is_none_exits_with_two(ksweep: Command, cache: Path, text: str) -> None:
    code, out, err = ksweep("gc", f"--older-than={text}", "--yes")
    assert (code, out) == (2, "") and "e.g. 30d or 12h" in err and len(there(cache)) == 3


def test_key_that_a_job_begins_to_read_after_gc_looked_is_kept(
    cache: Path, keys: dict[str, str], filled: tuple[Path, dict[str, str]]
) -> None:
    [removal] = [r for r in maintenance.unused(maintenance.entries(cache), 0, None) if r.key == keys["short"]]
    table = ensure(vector_spec(filled[0] / "short.parquet", 10), None, cache)
    assert not maintenance.remove(removal)
    assert np.array_equal(table.vectors(), random_vectors(10)) and keys["short"] in there(cache)


def test_gc_of_a_key_that_is_a_link_removes_the_link_alone(cache: Path, keys: dict[str, str], tmp_path: Path) -> None:
    directory, elsewhere = cache / keys["long"], tmp_path / "elsewhere"
    directory.rename(elsewhere)
    directory.symlink_to(elsewhere)
    (removal,) = [r for r in maintenance.unused(maintenance.entries(cache), 0, None) if r.path == directory]
    assert removal.bytes == 0 and "a link" in removal.reason
    assert maintenance.remove(removal) and not directory.is_symlink()
    assert list(elsewhere.glob("shard-*.arrow")) and not list(cache.glob(".removing-*"))


def test_filler_whose_directory_is_removed_begins_anew_and_ends_whole(cache: Path, keys: dict[str, str]) -> None:
    key = "e" * 32
    store = ActivationStore(cache, key, {})
    store.write_unit(0, make_unit(random_vectors(5)), "float32")
    [entry] = [e for e in maintenance.entries(cache) if e.key == key]
    [removal] = maintenance.unused([entry], 0, None)
    assert maintenance.remove(removal, force=True) and key not in there(cache)
    assert not [name for name in there(cache) if name.startswith(".removing")]
    assert store.missing_units(5, most_per_unit=5) == [0]
    store.write_unit(0, make_unit(random_vectors(5)), "float32")
    assert np.array_equal(store.open(5).vectors(), random_vectors(5))


@pytest.mark.slow
def test_removal_that_is_killed_leaves_no_half_key(
    cache: Path, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, filled: tuple[Path, dict[str, str]]
) -> None:
    script = (
        "import os, shutil, sys, signal; from pathlib import Path; from ksweep.activations import maintenance\n"
        "shutil.rmtree = lambda path: (os.unlink(next(Path(path).glob('shard-*.json'))), os.kill(os.getpid(), signal.SIGKILL))\n"
        "[r] = maintenance.unused([maintenance.entry_of(Path(sys.argv[1]), sys.argv[2])], 0, None); maintenance.remove(r)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(cache), keys["long"]], check=False)
    assert killed.returncode == -9 and keys["long"] not in there(cache)
    assert ensure(vector_spec(filled[0] / "long.parquet", 2500), None, cache).vectors().shape == (2500, 8)
    [removal] = maintenance.leftovers_in(cache)
    assert removal.path.name.startswith(f".removing-{keys['long']}") and maintenance.remove(removal)
    assert there(cache) == set(keys.values())


# ---- last used


def test_reading_a_table_renews_when_the_key_was_last_used(
    cache: Path, keys: dict[str, str], filled: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    used, began = cache / keys["long"] / "used", time.time() - 1.0  # file systems round
    table = ensure(vector_spec(filled[0] / "long.parquet", 2500), None, cache)
    assert used.stat().st_mtime >= began
    os.utime(used, (0, 0))
    table.vectors(0, 5)
    assert used.stat().st_mtime == 0, "at most once a minute"
    now[0] += 61
    table.vectors(0, 5)  # a job that goes on reading for hours says so
    assert used.stat().st_mtime >= began


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
@pytest.mark.parametrize("damaged", [False, True])
def test_cache_on_a_read_only_disk_is_read_all_the_same_and_damage_is_told(
    cache: Path, keys: dict[str, str], filled: tuple[Path, dict[str, str]], damaged: bool
) -> None:
    if damaged:
        flip_a_byte(next((cache / keys["long"]).glob("shard-00001-*.arrow")))
    script = (
        "import sys; from ksweep.activations import ensure; from ksweep.config.spec import Activations\n"
        "table = ensure(Activations(vectors=sys.argv[1], num_activations=2500, rows='first'), None, sys.argv[2])\n"
        "print(table.vectors().shape)"
    )
    mounted = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    command = [
        "unshare", "-rm", "sh", "-c", mounted, "sh", str(cache), sys.executable, "-c", script,
        str(filled[0] / "long.parquet"), str(cache),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    if damaged:
        assert "StoreError: shard 1 of" in done.stderr and "cannot be set aside (Read-only file system): ask" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "(2500, 8)\n"), done.stderr


def test_merged_copies_are_listed_and_removed_by_age(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path))
    for name, days in (("new", 1), ("old", 40)):
        (tmp_path / "merged" / name).mkdir(parents=True)
        (tmp_path / "merged" / name / "model.safetensors").write_bytes(b"12345")
        said = {"av": f"/runs/{name}/av", "dtype": "bfloat16", "files": {"model.safetensors": 5}}
        (tmp_path / "merged" / name / "merged.json").write_text(json.dumps(said))
        age(tmp_path / "merged" / name, days * DAY)
    listed = [json.loads(line) for line in command("cache", "merged", "--json")[1].splitlines()]
    assert [(row["av"], row["dtype"], row["bytes"]) for row in listed] == [
        ("/runs/new/av", "bfloat16", 5), ("/runs/old/av", "bfloat16", 5),
    ]  # fmt: skip
    assert "/runs/new/av" not in command("cache", "merged", "--older-than", "30d")[1]
    code, _, said_last = command("cache", "merged", "--older-than", "30d", "--remove")
    assert code == 0 and "freed 5 B" in said_last
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["new"]
