"""One tiny base model and one text for the whole room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.activations.helpers import passages, write_jsonl
from tests.tiny_models import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model") / "base", "llama", num_layers=3, d_model=16)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows, three in a row of one document; every tenth is too short for any position."""
    texts = passages(200)
    texts[::10] = ["No."] * 20
    return write_jsonl(tmp_path_factory.mktemp("text") / "rows.jsonl", texts, document=[f"book-{i // 3}" for i in range(200)])
