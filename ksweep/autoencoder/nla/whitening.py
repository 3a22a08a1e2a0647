"""Whitened pairs: what their sidecars state of the transform, and the transform itself.

A pair of this kind was trained on x' = (x - mean) W with W = covariance^(-1/2), symmetric, whose smallest eigenvalues were
floored (whitening branch of syvb/EasyNLA, nla/whitening.py at 32a729d). Its AV takes x', its AR gives x', and errors, baseline
and FVE are those of x': they are not comparable with those of raw vectors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.files import named_path
from ksweep.utils.hub import folders_upwards
from ksweep.utils.npz_files import npz_headers, read_npz_array
from ksweep.utils.sidecar_keys import abbreviated, is_done

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

METHOD = "whitened_zca_v1"
STATISTICS = "whitening_stats.npz"
KEYS = frozenset({
    "method", "stats_path", "stats_sha256", "shrinkage", "floor_quantile", "n_samples", "source", "base_model", "layer_index",
})  # fmt: skip
"""What the writer states of a transform; all but path and digest describe how the statistics were made."""


@dataclass(frozen=True)
class WhiteningStated:
    """What a sidecar states of the transform."""

    stats_path: str | None
    sha256: str
    """SHA-256 over the bytes of mean and W as little-endian float64, 64 hex digits."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """The transform of one set of vectors: x' = (x - mean) W."""

    mean: Float[np.ndarray, " d_model"]
    w: Float[np.ndarray, "d_model d_model"]
    sha256: str

    def apply(self, vectors: Float[np.ndarray, "activation d_model"]) -> Float[np.ndarray, "activation d_model"]:
        """Return whitened vectors, float32, computed in float64."""
        import numpy as np

        whitened: np.ndarray = ((vectors.astype(np.float64) - self.mean) @ self.w).astype(np.float32)
        return whitened


def stated_whitening(extraction: Any, path: Path) -> WhiteningStated | None:
    """Return what the section `extraction` of a sidecar states; None for raw vectors.

    Raises:
        CheckpointError: tag and block do not go together, or the tag is not known.
    """
    if not isinstance(extraction, Mapping):
        return None
    norm, block = extraction.get("norm"), extraction.get("whitening")
    is_raw = norm is None or is_done("norm", norm)
    if is_raw and (block is None or is_done("whitening", block)):
        return None
    if is_raw or not isinstance(block, Mapping):
        raise CheckpointError(
            f"{path} has extraction.norm={abbreviated(norm)} and extraction.whitening={abbreviated(block)}: a transform is "
            "stated by both or by neither. Use the sidecar that was released with the weights."
        )
    if norm != METHOD or block.get("method", METHOD) != METHOD:
        raise CheckpointError(
            f"{path} has extraction.norm={abbreviated(norm)}, whitening.method={abbreviated(block.get('method'))}; the known "
            f"transform is {METHOD}. Use a checkpoint made with it, or on raw vectors (norm: none)."
        )
    if unknown := sorted(map(str, block.keys() - KEYS)):
        raise CheckpointError(
            f"{path} has extraction.whitening.{abbreviated(unknown[0])[1:-1]}, which is not known and could change the "
            "transform. Use a pair without it."
        )
    sha256, stats_path = block.get("stats_sha256"), block.get("stats_path")
    if not isinstance(sha256, str) or len(sha256) != 64:
        raise CheckpointError(
            f"{path} has extraction.whitening.stats_sha256={abbreviated(sha256)}, expected 64 hex digits: the statistics could "
            "not be told from others. Use the sidecar that was released with the weights."
        )
    return WhiteningStated(stats_path if isinstance(stats_path, str) else None, sha256.lower())


def find_statistics(stated: WhiteningStated, directory: Path, given: str | None, d_model: int) -> Path:
    """Return the statistics file of a pair, once read: the one that the spec gives, else one beside or above the checkpoint.

    Raises:
        CheckpointError: there is none, or only others. Raw vectors would be taken for whitened ones.
    """
    # 1. Take the one that the spec gives.
    if given is not None:
        if not (path := named_path(given)).is_file():
            raise CheckpointError(
                f"autoencoder.whitening={given}: there is no such file. Give the statistics (.npz) of the pair."
            )
        read_statistics(path, stated, d_model)
        return path
    # 2. Else try those beside and above the checkpoint: a nearer file of the same name may be of another pair.
    name = Path(stated.stats_path or STATISTICS).name
    names = dict.fromkeys((name, STATISTICS))
    others: list[CheckpointError] = []
    for candidate in (place / name for place in folders_upwards(directory) for name in names):
        if not os.path.isfile(candidate):  # False also for a name that no file can have
            continue
        try:
            read_statistics(candidate, stated, d_model)
        except CheckpointError as error:
            others.append(error)
        else:
            return candidate
    # 3. Say what is wrong with the nearest.
    if others:
        raise others[0]
    raise CheckpointError(
        f"{directory} was trained on whitened activations ({METHOD}, statistics with sha256 {stated.sha256[:16]}...), and "
        f"{abbreviated(name)[1:-1]} is neither beside nor above it, so that raw activations cannot be whitened. Set "
        "autoencoder.whitening to the file."
    )


def read_statistics(path: Path, stated: WhiteningStated, d_model: int) -> Whitening:
    """Return the transform of a statistics file, once its digest and shapes are those stated.

    Raises:
        CheckpointError: it cannot be read, is of another width or of other statistics, or is not finite.
    """
    import numpy as np

    try:
        headers = npz_headers(path)
        shapes = [headers[name][0] for name in ("mean", "w")]
        if not all(headers[name][1].kind == "f" for name in ("mean", "w")):
            raise ValueError("mean and w are not floating-point numbers")
        if shapes == [(d_model,), (d_model, d_model)]:
            mean, w = (np.ascontiguousarray(read_npz_array(path, name), dtype="<f8") for name in ("mean", "w"))
    except Exception as error:  # whatever a damaged archive raises
        raise CheckpointError(
            f"{path} cannot be read as statistics of a whitening ({type(error).__name__}: {str(error)[:200]}); expected an .npz "
            "with the arrays mean and w. Copy it again."
        ) from error
    if shapes != [(d_model,), (d_model, d_model)]:
        raise CheckpointError(
            f"{path}: mean has shape {list(shapes[0])}, w {list(shapes[1])}; expected [{d_model}] and [{d_model}, {d_model}]. "
            "They are of another model."
        )
    digest = hashlib.sha256(mean.tobytes() + w.tobytes()).hexdigest()
    if digest != stated.sha256:
        raise CheckpointError(
            f"{path}: mean and w have sha256 {digest[:16]}..., the pair was trained with those of {stated.sha256[:16]}.... "
            "Give the statistics that were released with it."
        )
    if not (np.isfinite(mean).all() and np.isfinite(w).all()):
        raise CheckpointError(f"{path}: mean or w has NaN or infinite values. Copy it again.")
    transform = Whitening(mean, w, digest)
    with np.errstate(over="ignore", invalid="ignore"):
        probe = transform.apply(mean + np.random.default_rng(0).normal(size=(1, d_model)))
    if not (np.isfinite(probe).all() and probe.any()):
        raise CheckpointError(
            f"{path}: w makes {'infinite numbers' if probe.any() else 'nothing but zeros'} of a vector, as no whitening does. "
            "Copy it again, or use the statistics that the pair was trained with."
        )
    return transform


def check_same_space(av: WhiteningStated | None, ar: WhiteningStated | None) -> None:
    """Raise DataError unless AV and AR are of one space."""
    a, b = (None if stated is None else stated.sha256 for stated in (av, ar))
    if a != b:
        names = ["raw vectors" if sha is None else f"vectors whitened with {sha[:16]}..." for sha in (a, b)]
        raise DataError(f"the AV was trained on {names[0]}, the AR on {names[1]}: pass both halves of one pair")
