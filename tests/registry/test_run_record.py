"""What a run says is whole, unchanged and said once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep.registry.run_record import CURVE_SCHEMA, LandingError, new_run_id, read_run, write_run
from ksweep.utils.errors import StoreError
from ksweep.utils.notes import Note
from tests.registry.landed_runs import controls_of, curve_of, record_of, signed


def test_land_then_read_gives_back_record_curve_and_controls(root: Path) -> None:
    record = record_of("r1", tracebacks=("line 1\nline 2",), git_dirty=True, cut_off_rate=0.25)
    landed = read_run(write_run(root, record, curve_of(), controls_of()))
    assert landed.record == record
    assert landed.curve is not None and landed.curve["fve"].to_pylist() == [0.3, 0.31, 0.32, 0.33]
    assert landed.controls is not None and landed.controls["control"].to_pylist() == [
        "empty_text",
        "mean_vector",
        "retrieval_top1",
    ]
    assert [p.name for p in (root / "landing").iterdir()] == ["r1"], "nothing is left beside it"


def test_land_keeps_norms_reference_rows_token_counts_and_notes(root: Path) -> None:
    stats = {"counts": {"user": 3, "pad": 1, "total": 4}, "proportions": {"user": 1.0, "other": None}, "total_sequences": 2}
    record = record_of("r1", token_stats=stats, selected_token_stats=None, notes=(Note("layer", "why not"),))
    norms = pa.table({"activation": [0, 1], "norm": [1.5, float("nan")]})
    reference = pa.table({"quantity": ["avg_mse"], "k": [1], "value": [0.25]})
    landed = read_run(write_run(root, record, curve_of(), reference=reference, norms=norms))
    assert landed.record == record
    assert landed.norms is not None and landed.norms["norm"].to_pylist() == [1.5, None]
    assert landed.reference is not None and landed.reference["value"].to_pylist() == [0.25]


def test_land_failed_run_keeps_the_error_and_has_no_curve(root: Path) -> None:
    record = record_of("r1", status="failed", error_type="RunError", error_message="rank 1 died", tracebacks=("Traceback ...",))
    path = write_run(root, record)
    assert sorted(p.name for p in path.iterdir()) == ["record.json"]
    assert (read_run(path).record.error_message, read_run(path).curve) == ("rank 1 died", None)


def test_land_unknown_numbers_become_null_not_nan(root: Path) -> None:
    curve = curve_of().set_column(2, "fve_low", pa.array([float("nan")] * 4))
    landed = read_run(write_run(root, record_of("r1", tokens_per_second=float("inf")), curve))
    assert landed.curve is not None and landed.curve["fve_low"].to_pylist() == [None] * 4
    assert landed.record.tokens_per_second is None


def test_land_missing_nullable_columns_are_filled(root: Path) -> None:
    landed = read_run(write_run(root, record_of("r1"), curve_of().drop_columns(["shuffled_fve", "cosine"])))
    assert landed.curve is not None and landed.curve.schema.equals(CURVE_SCHEMA)
    assert landed.curve["cosine"].null_count == 4


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (None, "finished run needs a curve"),
        (curve_of().drop_columns(["fve"]), r"missing: \['fve'\]"),
        (curve_of().append_column("fev", pa.array([0.0] * 4)), r"not known: \['fev'\]"),
        (curve_of().set_column(0, "k", pa.array([1, 2, 2, 3])), "one row per K"),
        (curve_of().slice(0, 0), "one row per K"),
        (curve_of().set_column(1, "fve", pa.array([0.3, float("nan"), 0.3, 0.3])), "'fve', which is always known"),
    ],
)
def test_land_refuses_a_curve_that_does_not_fit_and_writes_nothing(root: Path, curve: pa.Table | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_run(root, record_of("r1"), curve)
    assert not list(root.rglob("*r1*"))


def test_land_twice_is_refused_and_the_first_stays(root: Path) -> None:
    write_run(root, record_of("r1"), curve_of(0.3))
    with pytest.raises(StoreError, match="r1 is already recorded"):
        write_run(root, record_of("r1"), curve_of(0.9))
    curve = read_run(root / "landing" / "r1").curve
    assert curve is not None and curve["fve"][0].as_py() == 0.3
    assert len(list((root / "landing").iterdir())) == 1


def test_record_times_are_utc_and_need_a_zone() -> None:
    paris = timezone(timedelta(hours=1))
    record = replace(record_of("r1"), finished=datetime(2026, 11, 22, 13, tzinfo=paris))
    assert record.finished == datetime(2026, 11, 22, 12, tzinfo=UTC)
    assert record.to_json()["finished"] == "2026-11-22T12:00:00+00:00"
    with pytest.raises(ValueError, match="no time zone"):
        replace(record, started=datetime(2026, 11, 22))


@pytest.mark.parametrize("run_id", ["", ".hidden", "a/b", "../up"])
def test_record_run_id_must_be_a_plain_name(run_id: str) -> None:
    with pytest.raises(ValueError, match="plain directory name"):
        record_of(run_id)


def test_new_run_id_names_the_cell_and_never_repeats() -> None:
    names = {new_run_id("3fa9c1d2aaaa") for _ in range(200)}
    assert len(names) == 200
    assert all(name.split("-")[1] == "3fa9c1d2" for name in names)


def test_read_refuses_every_kind_of_damage_by_name(root: Path) -> None:
    path = write_run(root, record_of("r1"), curve_of(), controls_of())
    whole = {p.name: p.read_bytes() for p in path.iterdir()}
    one_bit = bytearray(whole["curve.parquet"])
    one_bit[len(one_bit) // 2] ^= 1
    record = json.loads(whole["record.json"])
    damages = {
        "curve.parquet is not what was written": ("curve.parquet", bytes(one_bit)),
        "controls.parquet is not what was written": ("controls.parquet", whole["controls.parquet"][:-10]),
        "record.json is not valid JSON": ("record.json", whole["record.json"][:200]),
        "has no format and file list": ("record.json", b"{}"),
        "record.json is not what was written: its digest does not match": (
            "record.json",
            whole["record.json"].replace(b'"num_draws": ', b'"num_draws": 1'),
        ),
        "format 99, this ksweep reads up to 1: update": ("record.json", json.dumps({**record, "format": 99}).encode()),
        "is the record of r2": ("record.json", signed({**record, "run_id": "r2"}).encode()),
        "'done' is not one of finished": ("record.json", signed({**record, "status": "done"}).encode()),
        "missing 1 required keyword-only argument: 'cell_key'": (
            "record.json",
            signed({k: v for k, v in record.items() if k != "cell_key"}).encode(),
        ),
    }
    for message, (name, data) in damages.items():
        (path / name).write_bytes(data)
        with pytest.raises(LandingError, match=message):
            read_run(path)
        (path / name).write_bytes(whole[name])
    (path / "curve.parquet").unlink()
    with pytest.raises(LandingError, match=r"r1/curve\.parquet cannot be read: No such file"):
        read_run(path)


def test_read_leaves_out_keys_and_columns_of_a_later_ksweep(root: Path) -> None:
    path = write_run(root, record_of("r1"), curve_of())
    record = json.loads((path / "record.json").read_text())
    pq.write_table(curve_of().append_column("colour", pa.array(["blue"] * 4)), path / "curve.parquet")
    data = (path / "curve.parquet").read_bytes()
    files = {"curve.parquet": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (path / "record.json").write_text(signed({**record, "files": files, "colour": "blue"}))
    landed = read_run(path)
    assert landed.record == record_of("r1")
    assert landed.curve is not None and landed.curve.schema.equals(CURVE_SCHEMA)


@pytest.mark.parametrize(
    ("held", "error_class", "error_type"),
    [("DiskFullError", "disk full", "DiskFullError"), ("cancelled", "cancelled", None), ("KeyError", "bug", "KeyError")],
)
def test_a_record_in_which_one_field_held_class_or_type_is_read_as_both(
    root: Path, held: str, error_class: str, error_type: str | None
) -> None:
    path = write_run(root, record_of("r1", status="failed", error_type=held))
    raw = json.loads((path / "record.json").read_text())
    del raw["error_class"], raw["job"], raw["start"], raw["digest"]
    (path / "record.json").write_text(json.dumps(raw))
    record = read_run(path).record
    assert (record.error_class, record.error_type, record.job) == (error_class, error_type, None)
