from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty registry."""
    path = tmp_path / "registry"
    path.mkdir()
    return path
