"""A toy metric: how often a letter occurs in an explanation, and how far the activation is from the origin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


class Letters:
    name = "letters"
    columns = {"share_of_e": ("share of the characters that are e", "higher"), "norm": ("L2 norm of the activation", "neither")}  # noqa: RUF012
    needs_activations = True

    def __call__(self, draws: pa.Table, activations: Any) -> pa.Table:
        texts = draws["explanation"].to_pylist()
        shares = [text.count("e") / len(text) if text else None for text in texts]
        norms = np.linalg.norm(activations[draws["activation"].to_numpy()], axis=1)
        return pa.table({"share_of_e": pa.array(shares, pa.float64()), "norm": norms})
