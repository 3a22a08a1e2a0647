"""What a step of drawing takes on paper: `python scripts/gpu/roofline.py [H200 H100]`. Nothing is measured here.

Prompt of 125 tokens, 111 of them shared, texts of 130: with rows of all ages a row has 14 + 65 own places on average, and a graph
reads a rectangle of 192 (a multiple of 64 above 14 + 130). The bound is what no step can pass: every weight read once, or every
row multiplied with every weight. All times are in ms; what is assumed is beside each number.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

SHARED, OWN, WIDTH = 111, 79, 192
ROWS = (64, 256, 512, 768, 1024)
COLUMNS = (
    "model", "rows", "weights, keys and values GB", "bound, tokens/s", "products, attention, sampling, small kernels, host",
    "tokens/s (share)", "with ragged attention, fused kernels, the host one step behind",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int

    @property
    def multiplied(self) -> int:
        """Weights that a decoded token is multiplied with: blocks and head."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        block = self.width * (queries + 2 * keys) + queries * self.width + 3 * self.width * self.inner
        return self.layers * block + self.vocabulary * self.width

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of a token, bfloat16."""
        return self.layers * 2 * self.key_heads * self.head_dim * 2


SHAPES = {
    "Qwen2.5-7B": Shape(28, 3584, 18944, 28, 4, 128, 152064),
    "Gemma-3-12B": Shape(48, 3840, 15360, 16, 8, 256, 262208),
    "Gemma-3-27B": Shape(62, 5376, 21504, 32, 16, 128, 262208),
    "Llama-3.3-70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),
}


@dataclass(frozen=True)
class Device:
    """What a GPU does a second: at best, and in the kernels of a model."""

    copied: float
    read: float
    products: float
    model_products: float


DEVICES = {"H200": Device(4.3e12, 3.9e12, 790e12, 660e12), "H100": Device(3.35e12, 2.9e12, 790e12, 640e12)}
HOST = 0.6
"""Speed of its processor's threads against those that host_cost.py was run on, as a share of their time."""


def main() -> None:
    for name in sys.argv[1:] or DEVICES:
        print(f"\n{name}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for model, shape in SHAPES.items():
            for rows in ROWS:
                print(line(model, shape, DEVICES[name], rows))


def line(name: str, shape: Shape, device: Device, rows: int) -> str:
    weights = 2 * shape.multiplied
    bound = rows / max(weights / device.copied, weights * rows / device.products)
    pieces = today(shape, device, rows)
    now, then = 1e3 * rows / sum(pieces), 1e3 * rows / proposed(shape, device, rows)
    used = shape.bytes_per_token * (WIDTH * rows + SHARED) / 1e9
    columns = (
        name, str(rows), f"{weights / 1e9:.1f}, {used:.1f}", f"{bound:,.0f}", ", ".join(f"{piece:.1f}" for piece in pieces),
        f"{now:,.0f} ({now / bound:.0%})", f"{then:,.0f} ({then / bound:.0%})",
    )  # fmt: skip
    return f"| {' | '.join(columns)} |"


def products(shape: Shape, device: Device, rows: int) -> float:
    weights = 2 * shape.multiplied
    return 1e3 * max(weights / device.read, weights * rows / device.model_products)


def today(shape: Shape, device: Device, rows: int) -> tuple[float, float, float, float, float]:
    """Return the times of a step's products, attention, sampling, small kernels and host work."""
    # Keys and values at 0.6 of what kernels read, and 45 bytes a score, half of which stay in the L2 cache.
    read = shape.bytes_per_token * (WIDTH * rows + SHARED)
    scores = 45 * shape.heads * (SHARED + WIDTH) * rows * shape.layers
    attention = 1e3 * (read / (0.6 * device.read) + scores / (1.5 * device.read))
    sampling = 1e3 * 28 * rows * shape.vocabulary / device.read  # 28 bytes a logit
    # 48 kernels a block with gaps of 1.5 us, of which 0.4 hide behind long kernels.
    elementwise = 84 * shape.width + 20 * (shape.heads + shape.key_heads) * shape.head_dim + 20 * shape.inner
    small = 1e3 * elementwise * rows * shape.layers / (1.6 * device.read) + 0.6 * 48 * shape.layers * 1.5e-3
    # List work as host_cost.py measures it; four index kernels a block from Python at 11 us; transfers.
    host = HOST * (0.85 + rows / 768 * 1.7) + 4 * shape.layers * 0.011 + 0.3
    return products(shape, device, rows), attention, sampling, small, host


def proposed(shape: Shape, device: Device, rows: int) -> float:
    """Return a step's time with attention over used places, fused small kernels and sampling, and the host one step behind."""
    attention = 1e3 * shape.bytes_per_token * OWN * rows / (0.75 * device.read)
    sampling = 1e3 * 6 * rows * shape.vocabulary / device.read
    elementwise = 36 * shape.width + 8 * (shape.heads + shape.key_heads) * shape.head_dim + 8 * shape.inner
    small = 1e3 * elementwise * rows * shape.layers / (1.6 * device.read) + 16 * shape.layers * 1.2e-3
    return products(shape, device, rows) + attention + sampling + small + 0.3


if __name__ == "__main__":
    main()
