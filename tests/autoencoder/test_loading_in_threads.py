"""Loading in several threads of one process leaves transformers as it was."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from ksweep.activations.hidden_states import BlockReader
from ksweep.autoencoder.nla.models import load_nla_verbalizer

GEMMA = Path(__file__).parents[1] / "fixtures" / "nla" / "gemma3_text"


@pytest.mark.slow
def test_loading_in_threads_leaves_weight_tying_alone() -> None:
    before = PreTrainedModel.tie_weights
    failures: list[Exception] = []

    def load() -> None:
        try:
            for _ in range(3):
                BlockReader(str(GEMMA / "base"), 3, dtype="float32")
                load_nla_verbalizer(GEMMA / "nla-av", dtype="float32")  # tied: fails where tying has been lost
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and PreTrainedModel.tie_weights is before
