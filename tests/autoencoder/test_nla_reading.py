"""Texts that are read in one batch: each gets the vector that it has by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ksweep.autoencoder.nla.models import NlaReconstructor, load_nla_reconstructor
from tests.tiny_models import FAMILIES, make_pair

TEXTS = [
    "a red house",
    "a red car and a long way home",
    "",
    "a red",
    "a red house",
    "a",
    "\n",
    "日本",
    *(f"a red car, number {i} of {'many ' * (i % 3)}cars" for i in range(12)),
]


@pytest.fixture(scope="module", params=FAMILIES)
def reconstructor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NlaReconstructor:
    return load_nla_reconstructor(make_pair(tmp_path_factory.mktemp("pair"), request.param).ar, dtype=torch.float64)


@contextmanager
def reading(ar: NlaReconstructor) -> Iterator[list[tuple[tuple[int, ...], bool]]]:
    """The shape [text, token] of every forward pass, and whether it goes on from the template."""
    seen: list[tuple[tuple[int, ...], bool]] = []

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        seen.append((tuple(given["input_ids"].shape), given.get("past_key_values") is not None))

    handle = ar.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of models in float64: reconstructions are rounded to float32 (6e-8), as are norms within."""
    return float((one - other).abs().max() / other.abs().max()) < 1e-5


@pytest.mark.parametrize("order", [1, -1])
def test_texts_of_a_batch_have_the_vectors_that_they_have_alone(reconstructor: NlaReconstructor, order: int) -> None:
    texts: Sequence[str] = TEXTS[::order]
    alone = torch.cat([reconstructor.reconstruct_texts([text]) for text in texts])
    with reading(reconstructor) as seen:
        assert close(reconstructor.reconstruct_texts(texts), alone)
    assert sum(rows for (rows, _), _ in seen) == len(set(texts)) > len(seen)  # each distinct text once, several in a pass
    with reading(reconstructor) as seen:
        assert close(reconstructor.reconstruct_texts(texts, batch_size=3), alone)
    assert max(rows for (rows, _), _ in seen) == 3


def test_a_very_long_text_beside_short_ones_changes_nothing(reconstructor: NlaReconstructor) -> None:
    long = "a red car " * 20
    texts = ["a red", long, long + "stops", "a red car"]
    alone = torch.cat([reconstructor.reconstruct_texts([text]) for text in texts])
    assert close(reconstructor.reconstruct_texts(texts), alone)


def test_texts_that_merge_with_the_template_are_read_whole(reconstructor: NlaReconstructor) -> None:
    alone, common = reconstructor.reconstruct_texts(TEXTS, batch_size=1), reconstructor.prompts.common
    try:
        reconstructor.prompts.common = (*common[:-1], common[-1] + 1)
        with reading(reconstructor) as seen:
            assert close(reconstructor.reconstruct_texts(TEXTS), alone)
        assert not any(behind_template for _, behind_template in seen)
    finally:
        reconstructor.prompts.common = common


def test_bfloat16_differs_by_its_rounding(tmp_path: Path) -> None:
    path = make_pair(tmp_path, "llama").ar
    exact = load_nla_reconstructor(path, dtype="float32").reconstruct_texts(TEXTS, batch_size=1)
    rough = load_nla_reconstructor(path, dtype="bfloat16")
    errors = [
        float(1 - torch.cosine_similarity(rough.reconstruct_texts(TEXTS, batch_size=size), exact).min()) for size in (1, 64)
    ]
    assert errors[1] < 2 * errors[0] + 1e-5


def test_out_of_memory_batches_are_read_in_halves(reconstructor: NlaReconstructor, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a red {'very ' * (i % 7)}long text, the {i}th" for i in range(60)]
    expected, forward, failed = reconstructor.reconstruct_texts(texts), reconstructor.model.forward, []

    def small(**given: Any) -> Any:
        if len(given["input_ids"]) > 4:
            failed.append(len(given["input_ids"]))
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return forward(**given)

    monkeypatch.setattr(reconstructor.model, "forward", small)
    assert close(reconstructor.reconstruct_texts(texts), expected) and failed
