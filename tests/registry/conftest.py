from __future__ import annotations

from pathlib import Path

import pytest

from tests.registry.real_runs import real  # noqa: F401  # a fixture


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty registry."""
    path = tmp_path / "registry"
    path.mkdir()
    return path
