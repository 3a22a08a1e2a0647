"""Compare the norms of vectors with those that a pair was trained on: other norms are a sign of another layer or model.

Only their direction is injected, so lengths change no number. `injection_scale` says nothing of them: it is the length that every
vector is scaled to. They are compared with the training vectors' own, where the pair says it, and otherwise not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ksweep.utils.notes import Note

if TYPE_CHECKING:
    from jaxtyping import Float

FACTOR = 1.3
"""How far medians may lie apart. SmolLM2-135M on the demo's passages, medians by layer: 133 at 10, 167 at 15, 198 at 18, 223 at
19, 238 at 20; half of the activations of layer 20 lie between 229 and 250. Length does not tell neighbouring layers apart."""
SAME_LENGTH = 1e-3
"""Relative spread of lengths that are one length: float32 keeps 1e-7, bfloat16 4e-3 for a number and some 1e-4 for a length."""
FEWEST = 8
"""Fewer vectors than this give no median and no spread."""


def norm_notes(vectors: Float[np.ndarray, "activation d_model"], trained: float | None, source: str) -> Iterator[Note]:
    """Yield a note where the norms of vectors differ from those of the training, or are all the same.

    Args:
        trained: median norm of the training vectors; None if it is unknown, and nothing is compared.
        source: where the vectors come from, for the words.
    """
    if len(vectors) < FEWEST:
        return
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    median = float(np.median(norms))
    if trained is not None and not 1 / FACTOR <= median / trained <= FACTOR:
        yield Note(
            "norms",
            f"The activations of {source} have a median norm of {median:.3g}, and those that the pair was trained on had "
            f"{trained:.3g}: they may come from another layer or another model.",
        )
    if norms.std() < SAME_LENGTH * median:
        yield Note(
            "norms",
            f"All activations of {source} have the norm {median:.4g}: they were normalised before they were stored, and "
            "their own lengths are not known.",
        )
