from __future__ import annotations

from tests.registry.real_runs import real  # noqa: F401  # a fixture
