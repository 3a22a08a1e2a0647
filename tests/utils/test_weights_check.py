"""Where the check on the meta device runs, and when it is not repeated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.utils import weights_check
from ksweep.utils.errors import CheckpointError
from tests.tiny_models import TinyPair, edit_weights, make_pair

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyPair:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    return make_pair(tmp_path, "qwen2")


def test_checkpoint_that_was_found_whole_is_checked_again_only_once_it_changed(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def count(function: str, argument: object) -> None:
        asked.append(argument)

    monkeypatch.setattr(weights_check, "call_heavy", count)
    inspect_nla(pair.av, "av")
    inspect_nla(pair.av, "av")
    assert len(asked) == 1
    edit_weights(pair.av, change=lambda state: state.update({UP: state[UP] * 2}))  # other numbers of the same shape
    inspect_nla(pair.av, "av")
    assert len(asked) == 1
    edit_weights(pair.av, change=lambda state: state.pop(UP))
    inspect_nla(pair.av, "av")
    assert len(asked) == 2


def test_checkpoint_is_refused_every_time(pair: TinyPair) -> None:
    edit_weights(pair.av, change=lambda state: state.pop(UP))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"lacks {UP}"):
            inspect_nla(pair.av, "av")


def test_remembered_answer_that_is_damaged_is_asked_for_again(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect_nla(pair.av, "av")
    [entry] = (Path(pair.av).parent / "home" / "loadable").iterdir()
    asked = []
    monkeypatch.setattr(weights_check, "call_heavy", lambda *question: asked.append(question))
    entry.write_text("")
    inspect_nla(pair.av, "av")
    assert len(asked) == 1


def test_planning_goes_on_where_no_process_can_check_and_notes_what_was_not_checked(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(function: str, argument: object) -> None:
        raise ChildProcessError("the process that was to load transformers ended with exit status -9")

    monkeypatch.setattr(weights_check, "call_heavy", killed)
    [note] = inspect_nla(pair.av, "av").notes
    assert note.about == "checkpoint" and f"Whether the weights of {pair.av} are all there" in note.text
    assert note.text.endswith("the process that was to load transformers ended with exit status -9.")
    assert not list((Path(pair.av).parent / "home").glob("loadable/*"))


LAUNCHER = """
import sys
from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.utils import heavy_calls
from ksweep.utils.errors import CheckpointError
whole, damaged = sys.argv[1:]
inspect_nla(whole, "av")
child = heavy_calls._child
try:
    inspect_nla(damaged, "ar")
except CheckpointError as error:
    print(error)
print(child is heavy_calls._child, child.process.poll(), "torch" in sys.modules, "transformers" in sys.modules)
"""


@pytest.mark.slow
def test_launcher_asks_a_child_process_and_stays_light(pair: TinyPair) -> None:
    edit_weights(pair.ar, change=lambda state: state.pop(UP))
    run = subprocess.run([sys.executable, "-c", LAUNCHER, pair.av, pair.ar], capture_output=True, text=True, check=True)
    refusal, light = run.stdout.splitlines()
    assert f"it lacks {UP.removeprefix('model.')}" in refusal
    assert light == "True None False False"
