"""What is measured: frozen dataclasses. A `Cell` is everything that changes the numbers; `Resources` is where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from ksweep.config.validation import at_least, is_number, one_of
from ksweep.utils.errors import SpecError

if TYPE_CHECKING:
    from ksweep.stats import BaselineKind, ScoringKind

Dtype = Literal["bfloat16", "float16", "float32"]
PositionRule = Literal["random", "midpoint", "last", "all", "stride"]
Candidates = Literal["not_special", "not_padding"]
SelectionRule = Literal["order_statistics", "prefix"]
MeasuredBaseline = Literal["between_documents", "distance_from_mean"]
"""Baselines that are measured on the evaluated set."""
EncoderPrompt = Literal["learned", "text"]


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """A verbalizer and a reconstructor that belong together: a public NLA pair, or a talkative autoencoder."""

    av: str | None = None
    """Activation verbalizer: a directory in the public NLA layout, or a hub id ("owner/name", "owner/name@revision"). A key of
    its sidecar nla_meta.yaml that is not understood is refused by name (docs/sidecars.md)."""
    ar: str | None = None
    """Activation reconstructor: likewise."""
    checkpoint: str | None = None
    """Instead of av and ar: a talkative-autoencoder .pt file, or a directory of them (the one with the highest step)."""
    base: str | None = None
    """Base model (path or hub id) of PEFT adapters, or of a talkative autoencoder's halves; None takes the one that they name."""
    dtype: Dtype = "bfloat16"
    """Compute precision of AV and AR. Scores are always taken in float32. float32 is the exact mode: its draws do not depend on
    batch size or number of ranks; those of bfloat16 do, within rounding (see Resources.batch_size)."""
    encoder_prompt: EncoderPrompt = "learned"
    """Of a talkative autoencoder: what surrounds an explanation in the encoder. text: not the trained prompt, but the token
    embeddings of the words that it was initialised with (soft_prompt_init_text)."""

    def __post_init__(self) -> None:
        one_of("autoencoder.dtype", self.dtype, Dtype)
        one_of("autoencoder.encoder_prompt", self.encoder_prompt, EncoderPrompt)
        if (self.av is None or self.ar is None) == (self.checkpoint is None) or (self.checkpoint and (self.av or self.ar)):
            raise SpecError(
                f"an autoencoder is either a pair (av={self.av!r}, ar={self.ar!r}) or one file (checkpoint={self.checkpoint!r}): "
                "set autoencoder.av and autoencoder.ar, or autoencoder.checkpoint"
            )
        if self.encoder_prompt != "learned" and self.checkpoint is None:
            raise SpecError(
                f"autoencoder.encoder_prompt={self.encoder_prompt!r} is for a talkative autoencoder's encoder, and the AR of an "
                f"NLA pair ({self.ar}) has no trained prompt: leave it out, or set autoencoder.checkpoint"
            )

    @property
    def source(self) -> str:
        """What a person would call it: the checkpoint, or the AV."""
        return self.checkpoint or self.av or ""

    @property
    def scoring_kind(self) -> ScoringKind:
        """How reconstructions are compared with activations: a checkpoint's as they are, a pair's scaled to norm sqrt(d)."""
        return "normalised" if self.checkpoint is None else "raw"


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Which vectors: a base model, a layer, a text and a rule for positions; or ready-made vectors."""

    model: str | None = None
    """Base language model: path or hub id. None: the one that a talkative autoencoder names, or not needed with `vectors`. A
    fine-tune of the pair's base is noted in the record; a directory of another architecture or size is refused."""
    layer: int | None = None
    """Block whose output is taken (0-based; = hidden_states[layer + 1]). None: the layer that the autoencoder was trained on."""
    text: str | None = None
    """.txt (a document per blank-line-separated paragraph), .jsonl, .parquet, a `datasets` directory, or a hub dataset id. Text
    that begins with the model's BOS, as chat templates write it, gets no second one; all rows must begin so, or none."""
    text_column: str = "text"
    """Column of texts, or of lists of token ids, which are used as they are: padding (the tokenizer's pad id, else EOS) on either
    side is masked and left out, positions are indices in the padded row, min_position counts from its first other token."""
    text_split: str = "train"
    """Split of a hub dataset or a `datasets` directory of several splits."""
    document_column: str | None = None
    """Column, of text or of vectors, that names the document a row belongs to, the cluster of the bootstrap. None: "document"
    (of vectors "doc_id", else "document") where there is one, else each row is a document of its own."""
    vectors: str | None = None
    """Parquet file with an `activation_vector` column (public NLA datasets), used instead of model and text. Its sidecar
    FILE.nla_meta.yaml, where there is one, must say raw vectors (norm: none) of the pair's layer (docs/sidecars.md)."""
    num_activations: int = 1000
    positions: PositionRule = "random"
    candidates: Candidates = "not_special"
    """not_special: indices from min_position on whose token is not special. not_padding (talkative-autoencoder rule): from the
    first token that is not padding plus min_position to the last that is not, special tokens too; a shorter row has its last."""
    positions_per_document: int = 1
    """Positions drawn per row of text by "random", none twice; ignored by the other rules."""
    min_position: int = 50
    """Positions below this are left out: early ones carry little context (50 is the public NLA rule)."""
    stride: int = 16
    """Distance of neighbouring positions for the rule "stride", tokens."""
    max_length: int = 2048
    """Texts are cut to this many tokens; a row of token ids must fit, right padding aside."""
    max_norm: float | None = None
    """Extracted activations longer than this are left out; None keeps all."""
    seed: int = 42
    dtype: Dtype = "bfloat16"
    """Compute precision of the base model, and of the vectors on disk."""

    def __post_init__(self) -> None:
        one_of("activations.positions", self.positions, PositionRule)
        one_of("activations.candidates", self.candidates, Candidates)
        one_of("activations.dtype", self.dtype, Dtype)
        if self.max_norm is not None and not (is_number(self.max_norm) and self.max_norm > 0):
            raise SpecError(f"activations.max_norm={self.max_norm!r} must be a number > 0, or None to keep all")
        if self.max_norm is not None and self.vectors is not None:
            raise SpecError(
                "activations.max_norm leaves out activations extracted from text, and activations.vectors are ready-made: "
                "filter the file, or leave max_norm out"
            )
        at_least("activations.num_activations", self.num_activations, 1)
        at_least("activations.positions_per_document", self.positions_per_document, 1)
        at_least("activations.min_position", self.min_position, 0)
        at_least("activations.stride", self.stride, 1)
        at_least("activations.max_length", self.max_length, 1)
        if self.layer is not None:
            at_least("activations.layer", self.layer, 0)
        if self.vectors is None and self.text is None:
            raise SpecError(
                f"activations need a model and a text (text={self.text!r}; a talkative autoencoder names its model itself), or "
                "ready-made vectors: set activations.model and activations.text, or activations.vectors=FILE.parquet"
            )
        if self.candidates == "not_special" and self.min_position >= self.max_length:
            raise SpecError(
                f"activations.min_position={self.min_position} leaves nothing of rows cut to max_length={self.max_length} tokens"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How explanations are drawn."""

    temperature: float = 1.0
    """0 is greedy: every draw would be the same, so one is taken."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with at least this probability; 1 keeps all."""
    max_new_tokens: int = 200
    """Longer explanations are cut off. Those of a checkpoint always have the length that it was trained with."""
    num_draws: int = 16
    """Explanations per activation; every K up to this is read off the same draws."""
    seed: int = 0
    """Draw k of an activation is made of this seed, the activation and k: in float32 the same on any number of ranks."""

    def __post_init__(self) -> None:
        if not (is_number(self.temperature) and self.temperature >= 0):
            raise SpecError(f"sampling.temperature={self.temperature!r} must be a finite number >= 0 (0 is greedy)")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise SpecError(f"sampling.top_p={self.top_p!r} must lie in (0, 1]; 1 keeps every token")
        at_least("sampling.max_new_tokens", self.max_new_tokens, 1)
        at_least("sampling.num_draws", self.num_draws, 1)
        at_least("sampling.seed", self.seed, 0)

    @property
    def effective_num_draws(self) -> int:
        """Draws that are really taken: one when greedy, since all would be equal."""
        return 1 if self.temperature == 0 else self.num_draws


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How draws become a curve."""

    ks: tuple[int, ...] | None = None
    """Values of K to report; None reports every K from 1 to num_draws."""
    baseline: float | MeasuredBaseline | None = None
    """Error at which FVE is 0. between_documents (None means the same): half the mean squared distance between evaluated
    activations of different documents (of a pair: of the scaled ones). distance_from_mean: mean squared distance from the
    evaluated set's own mean, as the public code has it: too low with few or uneven documents. A number states it (the released
    pairs quote 0.7335, 0.0302, ...)."""
    failed_error: float = 2.0
    """Error of an activation all of whose draws failed: 2 is an orthogonal reconstruction. A checkpoint's draws never fail."""
    selection: SelectionRule = "order_statistics"
    """order_statistics: the average over every choice of K draws. prefix: the best of the first K, as the reference has it."""
    level: float = 0.95
    """Coverage of the intervals."""
    num_replicates: int = 2000
    """Bootstrap replicates over documents."""
    seed: int = 0
    reference_replicates: int = 0
    """Of a checkpoint: replicates of the reference's own bootstrap of its quantities, over single vectors (percentile and BCa
    intervals, its seed 42; it had 1000). 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.ks is not None:
            if not isinstance(self.ks, (tuple, list)):
                raise SpecError(f"scoring.ks={self.ks!r} must be a list of whole numbers, e.g. (1, 2, 4, 8)")
            if not self.ks:
                raise SpecError("scoring.ks is empty; leave it out (every K), or name at least one, e.g. scoring.ks=[1,2,4,8]")
            for k in self.ks:
                at_least("scoring.ks", k, 1)
            object.__setattr__(self, "ks", tuple(sorted(set(self.ks))))
        if self.baseline == "between_documents":  # one spelling, so that both are one cell
            object.__setattr__(self, "baseline", None)
        measured = self.baseline is None or self.baseline in get_args(MeasuredBaseline)
        if not measured and not (is_number(self.baseline) and self.baseline > 0):  # type: ignore[operator]
            raise SpecError(
                f"scoring.baseline={self.baseline!r} must be a number > 0, or one of {', '.join(get_args(MeasuredBaseline))}, "
                "which measure it on the evaluated set"
            )
        one_of("scoring.selection", self.selection, SelectionRule)
        if not (is_number(self.level) and 0 < self.level < 1):
            raise SpecError(f"scoring.level={self.level!r} must lie between 0 and 1, e.g. 0.95")
        at_least("scoring.num_replicates", self.num_replicates, 2)
        at_least("scoring.reference_replicates", self.reference_replicates, 0)
        if self.reference_replicates == 1:
            raise SpecError(
                "scoring.reference_replicates=1 has no spread: ask for at least 2 (the reference had 1000), or 0 for none"
            )
        if not (is_number(self.failed_error) and self.failed_error > 0):
            raise SpecError(
                f"scoring.failed_error={self.failed_error!r} must be a number > 0 (2.0 counts a failure as orthogonal)"
            )

    @property
    def stated_baseline(self) -> float | None:
        """The baseline where a number states it; None where it is measured."""
        return cast("float", self.baseline) if is_number(self.baseline) else None

    @property
    def baseline_kind(self) -> BaselineKind:
        """What the baseline is, in the words of the registry."""
        if self.stated_baseline is not None:
            return "stated constant"
        return "distance from mean" if self.baseline == "distance_from_mean" else "between documents"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of a sweep: everything that changes its numbers, and nothing else."""

    autoencoder: Autoencoder
    activations: Activations
    sampling: Sampling = field(default_factory=Sampling)
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        ks, num_draws = self.scoring.ks, self.sampling.num_draws
        if ks is not None and max(ks) > num_draws:
            raise SpecError(
                f"scoring.ks asks for K={max(ks)} but sampling.num_draws={num_draws}: best-of-K needs at least K draws. "
                f"Raise sampling.num_draws to {max(ks)} or leave out the larger K."
            )
        baseline = self.scoring.stated_baseline
        if self.autoencoder.scoring_kind == "normalised" and baseline is not None and baseline > 2:
            raise SpecError(
                f"scoring.baseline={baseline!r} must lie in (0, 2] (of vectors scaled to norm sqrt(d)), or be None to measure "
                "it; only a checkpoint is scored on raw vectors"
            )
        self._check_reference()
        if self.activations.num_activations < 2 and baseline is None:
            raise SpecError(
                "activations.num_activations=1 has no variance to explain: ask for more activations, or state scoring.baseline"
            )

    def _check_reference(self) -> None:
        asked, n = self.scoring.reference_replicates, self.activations.num_activations
        if asked and self.autoencoder.checkpoint is None:
            raise SpecError(
                f"scoring.reference_replicates={asked}: the reference's quantities are of raw reconstructions, which only a "
                "checkpoint has. Leave it out (0); the pair's FVE has its interval from scoring.num_replicates"
            )
        if asked and n < 3:
            raise SpecError(
                f"scoring.reference_replicates={asked} needs at least 3 activations, and activations.num_activations={n}: ask "
                "for more, or leave it out (0)"
            )

    @property
    def ks(self) -> tuple[int, ...]:
        """Every K that is reported; for a greedy cell, which has one draw, K = 1."""
        n = self.sampling.effective_num_draws
        asked = self.scoring.ks if self.scoring.ks is not None else range(1, n + 1)
        return tuple(k for k in asked if k <= n) or (1,)


def cell_from_dict(value: Mapping[str, Any]) -> Cell:
    """The cell that `dataclasses.asdict` wrote (JSON turns its tuples into lists)."""
    scoring = dict(value["scoring"])
    if scoring.get("ks") is not None:
        scoring["ks"] = tuple(scoring["ks"])
    return Cell(
        autoencoder=Autoencoder(**value["autoencoder"]),
        activations=Activations(**value["activations"]),
        sampling=Sampling(**value["sampling"]),
        scoring=Scoring(**scoring),
    )


def replace_at(spec: Any, path: str, value: Any) -> Any:
    """A copy of a (nested) spec with the field at a dotted path changed: `replace_at(cell, "sampling.seed", 1)`."""
    head, _, rest = path.partition(".")
    if not is_dataclass(spec) or head not in {f.name for f in fields(spec)}:
        known = ", ".join(f.name for f in fields(spec)) if is_dataclass(spec) else "nothing below it"
        raise SpecError(f"{type(spec).__name__} has no field {head!r}; it has {known}")
    changed = replace_at(getattr(spec, head), rest, value) if rest else value
    return replace(spec, **{head: changed})  # type: ignore[type-var]
