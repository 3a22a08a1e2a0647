"""Ready-made specs: the bundled demo pair, its held-out passages, and the released public pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ksweep.config.spec import Activations, Autoencoder
from ksweep.utils.errors import RequestError
from ksweep.utils.files import home

DEMO = Path(__file__).parents[1] / "demo"
DEMO_MODEL = "smollm2-135m-instruct"

RELEASED = {
    "qwen2.5-7b": ("kitft/nla-qwen2.5-7b-L20-av", "kitft/nla-qwen2.5-7b-L20-ar", "Qwen/Qwen2.5-7B-Instruct", 0.7335),
    "gemma3-12b": ("kitft/nla-gemma3-12b-L32-av", "kitft/nla-gemma3-12b-L32-ar", "google/gemma-3-12b-it", 0.0302),
    "gemma3-27b": ("kitft/nla-gemma3-27b-L41-av", "kitft/nla-gemma3-27b-L41-ar", "google/gemma-3-27b-it", 0.0579),
    "llama3.3-70b": (
        "kitft/Llama-3.3-70B-NLA-L53-av",
        "kitft/Llama-3.3-70B-NLA-L53-ar",
        "meta-llama/Llama-3.3-70B-Instruct",
        0.9169,
    ),
}
"""Short name -> hub ids of AV, AR and base model, and the baseline that the model card measures FVE against (training mix)."""


def demo_pair(*, trained_ar: bool = True) -> Autoencoder:
    """Return the pair that comes with the repository: small adapters over SmolLM2-135M-Instruct, layer 20.

    `trained_ar=False` takes the AR before training: the frozen base with an identity head.
    """
    ar = DEMO / "ar" if trained_ar else DEMO / "untrained" / "ar"
    return Autoencoder(av=str(DEMO / "av"), ar=str(ar), base=demo_model())


def held_out_passages(**changes: Any) -> Activations:
    """Return activations of passages that the demo pair was not trained on; `changes` replace fields."""
    settings: dict[str, Any] = {
        "model": demo_model(),
        "text": str(DEMO / "passages.jsonl"),
        "num_activations": 128,
        "rows": "first",  # passages.jsonl has a passage of each chapter before the second of any
        "min_position": 24,
        "max_length": 96,
        "seed": 0,
    }
    return Activations(**(settings | changes))


def released_pair(name: str, **changes: Any) -> Autoencoder:
    """Return a public pair by short name: qwen2.5-7b, gemma3-12b, gemma3-27b, llama3.3-70b; `changes` replace fields."""
    if name not in RELEASED:
        raise RequestError(f"no released pair {name!r}; there are {', '.join(RELEASED)}")
    av, ar, _, _ = RELEASED[name]
    return Autoencoder(av=av, ar=ar, **changes)


def demo_model() -> str:
    """Return where the set-up step keeps the demo's base model, SmolLM2-135M-Instruct (Apache-2.0).

    Whether it exists is checked when a spec runs, so that overrides can name another model.
    """
    return str(home() / "models" / DEMO_MODEL)
