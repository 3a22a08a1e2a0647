"""As much of vLLM's module as is imported."""

from types import SimpleNamespace

RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)
