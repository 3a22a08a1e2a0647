"""`ksweep doctor`: the engine's self-test is passed by a good engine and by no other, and bad stores are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ksweep.autoencoder import slots
from ksweep.cli import main
from ksweep.registry.landing import land
from ksweep.selftest import failures
from tests.registry.landed_runs import curve_of, record_of


def test_the_engine_passes_its_self_test() -> None:
    assert failures("cpu") == []


def test_slots_that_mix_up_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = slots.SlotLayer.put

    def of_the_first(layer: slots.SlotLayer, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        real(layer, first, keys[:1].expand_as(keys), values[:1].expand_as(values))

    monkeypatch.setattr(slots.SlotLayer, "put", of_the_first)
    assert "greedy text from the forked cache differs from plain decoding without one" in failures("cpu")


def test_doctor_names_a_landing_that_is_not_believed_and_exits_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    land(tmp_path / "registry", record_of("r1"), curve_of())
    (tmp_path / "registry" / "landing" / "r1" / "curve.parquet").write_bytes(b"cut short")
    monkeypatch.setattr("ksweep.selftest.failures", lambda device: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ksweep", "doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    bad = [finding for finding in findings if finding["state"] == "bad"]
    assert ended.value.code == 1 and [finding["subject"] for finding in bad] == ["registry"]
    assert "r1/curve.parquet is not what was written" in bad[0]["said"]
    assert {"machine", "packages", "vector cache", "disk", "engine on cpu"} <= {finding["subject"] for finding in findings}
