"""Worst difference from the golden NLA fixtures, per array: `python -m tests.report_fixture_differences`.

Relative means max|a-b| / max|b| over the array, as in tests/fixtures/nla/README.md; its last column is
repeated here as `allow`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ksweep.autoencoder.nla.models import NlaReconstructor, NlaVerbalizer, load_nla_reconstructor, load_nla_verbalizer
from ksweep.inference.prefill import prefill

FIXTURES = Path(__file__).parent / "fixtures" / "nla"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))


@dataclass(frozen=True)
class Difference:
    """One array against its expected values."""

    array: str
    absolute: float
    relative: float
    allow: float
    allow_is_absolute: bool = False

    @property
    def ok(self) -> bool:
        return (self.absolute if self.allow_is_absolute else self.relative) <= self.allow


def differences(case: str, device: str = "cpu", batch_size: int = 64) -> list[Difference]:
    """Everything that a pair computes in float32, against expected.npz."""
    expected = np.load(FIXTURES / case / "expected.npz")
    texts = json.loads((FIXTURES / case / "expected.json").read_text())["ar"]["texts"]
    av = load_nla_verbalizer(FIXTURES / case / "nla-av", dtype="float32", device=device)
    ar = load_nla_reconstructor(FIXTURES / case / "nla-ar", dtype="float32", device=device)
    activations = torch.tensor(expected["activations"])
    embeds, logits, greedy = verbalize(av, activations, expected["av_greedy_ids"].shape[1])
    reconstructions = reconstruct(ar, texts, batch_size)
    errors, cosines = scores(reconstructions, expected["activations"])
    return [
        _difference("av_inputs_embeds", embeds[:2], expected, 1e-6),
        _difference("av_next_token_logits", logits, expected, 1e-4),
        _difference("av_greedy_ids", greedy, expected, 0),
        _difference("ar_reconstructions", reconstructions, expected, 1e-4),
        _difference("ar_mse_nrm", errors, expected, 1e-5, absolute=True),
        _difference("ar_cos", cosines, expected, 1e-5, absolute=True),
    ]


@torch.inference_mode()
def verbalize(av: NlaVerbalizer, activations: torch.Tensor, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the first block really received, the logits after the prompt, and a plain argmax loop over prefill and cache."""
    received: list[torch.Tensor] = []

    def look(_module: Any, args: Any, kwargs: Any) -> None:
        received.append(args[0] if args else kwargs["hidden_states"])

    handle = av.model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    prompts = prefill(av.model, av.prompts(activations))
    handle.remove()
    logits, tokens = prompts.logits, []
    for _ in range(num_tokens):
        tokens.append(logits.argmax(dim=1))
        logits = av.model(input_ids=tokens[-1][:, None], past_key_values=prompts.cache, use_cache=True).logits[:, -1]
    return received[-1].cpu().numpy(), prompts.logits.cpu().numpy(), torch.stack(tokens, dim=1).cpu().numpy()


def reconstruct(ar: NlaReconstructor, texts: list[str], batch_size: int) -> np.ndarray:
    return ar.reconstruct_texts(texts, batch_size=batch_size).numpy()


def scores(reconstructions: np.ndarray, activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Error 2(1 - cos) and cosine of every activation with every reconstruction, float64."""
    a, b = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (activations, reconstructions)
    )
    return 2 - 2 * a @ b.T, a @ b.T


def _difference(name: str, found: np.ndarray, expected: Any, allow: float, absolute: bool = False) -> Difference:
    assert found.shape == expected[name].shape, f"{name}: {found.shape} instead of {expected[name].shape}"
    worst = float(np.abs(found.astype(np.float64) - expected[name]).max())
    return Difference(name, worst, worst / float(np.abs(expected[name]).max()), allow, absolute)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    print(f"{'case':12} {'array':22} {'worst abs':>10} {'relative':>10} {'allow':>12}  (device {device})")
    for case in CASES:
        for d in differences(case, device):
            allow = f"{d.allow:g} {'abs' if d.allow_is_absolute else 'rel'}"
            print(f"{case:12} {d.array:22} {d.absolute:10.2e} {d.relative:10.2e} {allow:>12}  {'ok' if d.ok else 'TOO FAR'}")


if __name__ == "__main__":
    main()
