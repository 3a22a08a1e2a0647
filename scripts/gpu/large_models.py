"""Where do pairs over 27 and 70 billion weights fit, and how? `python scripts/gpu/large_models.py` writes the tables of
docs/large_models.md. On paper: sizes from the shapes, the plan from the functions that a rank itself asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gpu_common  # noqa: F401  # where ksweep is
from roofline import DEVICES, SHAPES, Shape

from ksweep.config.spec import Sampling
from ksweep.evaluation.memory_plan import Fit, fit_of_weights
from ksweep.inference.engine import MEMORY_SHARE
from ksweep.inference.request import MOST_DRAWS

PAGE = Path(__file__).parents[2] / "docs" / "large_models.md"
BEGIN, END = "<!-- begin of scripts/gpu/large_models.py -->", "<!-- end of scripts/gpu/large_models.py -->"
GPU_BYTES = {"80 GB": 80 * 10**9, "141 GB": 141 * 10**9}
OF_SIZE = {"80 GB": DEVICES["H100"], "141 GB": DEVICES["H200"]}
NUM_GPUS = (1, 2, 4, 8)
COLUMNS = (
    "GPUs", "command", "ranks", "AV and AR", "weights on each GPU, AV + AR", "draws in flight of each rank",
    "bound of the node, tokens/s",
)  # fmt: skip
OWN_PROMPT = 14
"""Tokens of a prompt from the vector on, which each activation has for itself."""


@dataclass(frozen=True)
class Pair:
    """A released pair: an AV of the whole model, an AR of its blocks 0 to L without head."""

    name: str
    layer: int
    shares_embeddings: bool
    """Whether the head's weight is that of the token embeddings."""

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    @property
    def av_bytes(self) -> int:
        """Weights in bfloat16. Norms and biases, some millionths of them, are left out."""
        return 2 * (self.shape.multiplied + (0 if self.shares_embeddings else self._embeddings))

    @property
    def ar_bytes(self) -> int:
        blocks = (self.shape.multiplied - self._embeddings) // self.shape.layers * (self.layer + 1)
        return 2 * (blocks + self._embeddings + self.shape.width**2)

    @property
    def _embeddings(self) -> int:
        return self.shape.vocabulary * self.shape.width


PAIRS = (Pair("Llama-3.3-70B", 53, False), Pair("Gemma-3-27B", 41, True))


@dataclass(frozen=True)
class Plan:
    """How a pair runs on the GPUs of a node."""

    gpus_per_model: int
    ranks: int
    fit: Fit
    rows: int
    """Draws in flight on each rank."""


def plan(pair: Pair, num_gpus: int, gpu_bytes: int, max_new_tokens: int = Sampling().max_new_tokens) -> Plan | None:
    """Return the plan with the most ranks; None where nothing fits."""
    for each in (size for size in range(1, num_gpus + 1) if num_gpus % size == 0):
        fit = fit_of_weights(pair.av_bytes, pair.ar_bytes, [gpu_bytes] * each)
        if fit == "too large":
            continue
        free = each * gpu_bytes - pair.av_bytes - (pair.ar_bytes if fit == "together" else 0)
        per_row = pair.shape.bytes_per_token * (OWN_PROMPT + max_new_tokens) + 4 * pair.shape.vocabulary
        return Plan(each, num_gpus // each, fit, min(MOST_DRAWS, int(MEMORY_SHARE * free / per_row)))
    return None


def table(pair: Pair) -> str:
    lines = [
        f"**{pair.name}**, layer {pair.layer}: AV {pair.av_bytes / 1e9:.0f} GB, AR {pair.ar_bytes / 1e9:.0f} GB, "
        f"{pair.shape.bytes_per_token / 1e3:.0f} kB of keys and values a token",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for size, gpu_bytes in GPU_BYTES.items():
        for num_gpus in NUM_GPUS:
            found = plan(pair, num_gpus, gpu_bytes)
            if found is None:
                lines.append(f"| {num_gpus} x {size} | - | | do not fit | | | |")
                continue
            weights = 2 * pair.shape.multiplied
            seconds = max(weights / OF_SIZE[size].copied, weights * found.rows / OF_SIZE[size].products)
            several = f" gpus_per_model={found.gpus_per_model}" if found.gpus_per_model > 1 else ""
            on_each = " + ".join(f"{half / found.gpus_per_model / 1e9:.0f}" for half in (pair.av_bytes, pair.ar_bytes))
            columns = (
                f"{num_gpus} x {size}", f"`gpus={num_gpus}{several}`", str(found.ranks), found.fit, f"{on_each} GB",
                str(found.rows), f"{found.ranks * found.rows / seconds:,.0f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n\n".join(table(pair) for pair in PAIRS)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")


if __name__ == "__main__":
    main()
