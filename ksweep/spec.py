"""What is measured: frozen dataclasses. A `Cell` is everything that changes the numbers; `Resources` is where it runs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from ksweep.errors import SpecError
from ksweep.naming import repeated, short_names

if TYPE_CHECKING:
    from ksweep.stats import ScoringKind

Dtype = Literal["bfloat16", "float16", "float32"]
PositionRule = Literal["random", "midpoint", "last", "all", "stride"]
Candidates = Literal["not_special", "not_padding"]
Selection = Literal["order_statistics", "prefix"]
MeasuredBaseline = Literal["between_documents", "distance_from_mean"]
"""Baselines that are measured on the evaluated set."""
BaselineKind = Literal["between documents", "distance from mean", "stated constant"]
"""What a baseline is, in the words of tables and charts."""
EncoderPrompt = Literal["learned", "text"]
Cluster = Literal["auto", "slurm", "local", "inprocess"]


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
        _one_of("autoencoder.dtype", self.dtype, Dtype)
        _one_of("autoencoder.encoder_prompt", self.encoder_prompt, EncoderPrompt)
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
        _one_of("activations.positions", self.positions, PositionRule)
        _one_of("activations.candidates", self.candidates, Candidates)
        _one_of("activations.dtype", self.dtype, Dtype)
        if self.max_norm is not None and not (_is_number(self.max_norm) and self.max_norm > 0):
            raise SpecError(f"activations.max_norm={self.max_norm!r} must be a number > 0, or None to keep all")
        if self.max_norm is not None and self.vectors is not None:
            raise SpecError(
                "activations.max_norm leaves out activations extracted from text, and activations.vectors are ready-made: "
                "filter the file, or leave max_norm out"
            )
        _at_least("activations.num_activations", self.num_activations, 1)
        _at_least("activations.positions_per_document", self.positions_per_document, 1)
        _at_least("activations.min_position", self.min_position, 0)
        _at_least("activations.stride", self.stride, 1)
        _at_least("activations.max_length", self.max_length, 1)
        if self.layer is not None:
            _at_least("activations.layer", self.layer, 0)
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
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise SpecError(f"sampling.temperature={self.temperature!r} must be a finite number >= 0 (0 is greedy)")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise SpecError(f"sampling.top_p={self.top_p!r} must lie in (0, 1]; 1 keeps every token")
        _at_least("sampling.max_new_tokens", self.max_new_tokens, 1)
        _at_least("sampling.num_draws", self.num_draws, 1)
        _at_least("sampling.seed", self.seed, 0)

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
    selection: Selection = "order_statistics"
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
                _at_least("scoring.ks", k, 1)
            object.__setattr__(self, "ks", tuple(sorted(set(self.ks))))
        if self.baseline == "between_documents":  # one spelling, so that both are one cell
            object.__setattr__(self, "baseline", None)
        measured = self.baseline is None or self.baseline in get_args(MeasuredBaseline)
        if not measured and not (_is_number(self.baseline) and self.baseline > 0):  # type: ignore[operator]
            raise SpecError(
                f"scoring.baseline={self.baseline!r} must be a number > 0, or one of {', '.join(get_args(MeasuredBaseline))}, "
                "which measure it on the evaluated set"
            )
        _one_of("scoring.selection", self.selection, Selection)
        if not (_is_number(self.level) and 0 < self.level < 1):
            raise SpecError(f"scoring.level={self.level!r} must lie between 0 and 1, e.g. 0.95")
        _at_least("scoring.num_replicates", self.num_replicates, 2)
        _at_least("scoring.reference_replicates", self.reference_replicates, 0)
        if self.reference_replicates == 1:
            raise SpecError(
                "scoring.reference_replicates=1 has no spread: ask for at least 2 (the reference had 1000), or 0 for none"
            )
        if not (_is_number(self.failed_error) and self.failed_error > 0):
            raise SpecError(
                f"scoring.failed_error={self.failed_error!r} must be a number > 0 (2.0 counts a failure as orthogonal)"
            )

    @property
    def stated_baseline(self) -> float | None:
        """The baseline where a number states it; None where it is measured."""
        return cast("float", self.baseline) if _is_number(self.baseline) else None

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


PATHS = ("av", "ar", "checkpoint", "base", "model", "text", "vectors")
"""Fields of a cell that hold a path or a hub id."""

LONGEST_PLAIN_MINUTES = 7 * 24 * 60


_LOST = "without ours a job would be lost sight of"
_TOLD = "without ours a job could not be told to stop, or would not come back"
_SHAPE = "its ranks would be others than planned; set resources.gpus, tasks or nodes"
OWN_OPTIONS = {
    **dict.fromkeys(("comment", "error", "open-mode", "output", "parsable", "test-only", "wait", "wrap"), _LOST),
    **dict.fromkeys(("requeue", "no-requeue", "signal"), _TOLD),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "nodes", "ntasks", "ntasks-per-gpu", "ntasks-per-node"), _SHAPE),
    "array": "an element is a job of ours; set resources.cells_per_job or max_parallel_jobs",
    "clusters": "jobs are looked for on this cluster; log in to the other one",
    "time": "set resources.time", "partition": "set resources.partition", "account": "set resources.account",
    "qos": "set resources.qos", "constraint": "set resources.constraint", "job-name": "set resources.job_name",
    "nice": "set resources.nice", "mem": "set resources.mem_gb", "cpus-per-gpu": "set resources.cpus_per_gpu",
    "cpus-per-task": "set resources.cpus_per_gpu, or cpus_per_task with gpus=0",
}  # fmt: skip
"""Options of sbatch that `Resources.extra` cannot take over, and why."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where and how a sweep runs; never part of any identity. `batch_size` says what of this can change draws in bfloat16."""

    cluster: Cluster = "auto"
    """auto: Slurm where a cluster is set up, else local. inprocess: here, for debugging."""
    gpus: int | None = None
    """GPUs of a job on each node, one rank for every `gpus_per_model` of them. 0 runs on the CPU; None takes what machine or
    partition has, one at most."""
    tasks: int | None = None
    """Ranks on each node when gpus=0. None: on this machine one a core, up to 8, as far as memory and the number of draws to be
    taken allow; on Slurm one."""
    nodes: int = 1
    """Nodes of a job: its ranks form one process group, and each takes draws that are still to be done."""
    gpus_per_model: int = 1
    """GPUs over which a rank spreads each of its models, for models that one GPU cannot hold; `gpus` is a multiple of it."""
    cpus_per_gpu: int | None = None
    cpus_per_task: int | None = None
    """CPUs of each rank when gpus=0, and so its threads. None: an equal share of the cores that the job has."""
    mem_gb: float | None = None
    """Memory on each node. None: the cluster's default, or all of it with `exclusive`."""
    time: int | str = 24 * 60
    """Limit of one start of a job: minutes, or as Slurm writes it ("24:00:00", "2-12"). A job that reaches it is requeued."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that a node must have, e.g. "h100" or "h100&ib"."""
    nice: bool | int = False
    """true (10000) or a number: lets other jobs go first. Every job can be requeued, whatever its priority."""
    exclusive: bool | None = None
    """Whether nodes are not shared. None: when a whole node of 8 GPUs is asked for."""
    job_name: str | None = None
    """Name in the queue. None: the sweep's."""
    setup: str | tuple[str, ...] = ()
    """Shell lines that a job runs before Python, e.g. "module load cuda"."""
    cells_per_job: int | None = None
    """None: all cells that share an autoencoder, so that models are loaded once."""
    max_parallel_jobs: int | None = None
    """Most jobs of the sweep that run at once. None: as many as there is room for."""
    batch_size: int | None = None
    """Most draws in flight, and texts scored, at once on one rank. None: as many draws as memory allows, up to 768. With
    autoencoder.dtype=float32 the draws are the same, bit for bit, for every batch size and number of ranks. In bfloat16 another
    batch size rounds otherwise and flips near ties: of the demo pair's draws 15, 17 and 29 % had other tokens at temperatures
    0.4, 0.8 and 1.2 (on a CPU). What is stored is never drawn again; the run record says with which settings (runs.engine)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Any further sbatch option, passed through, e.g. {"reservation": "nightly"}."""

    def __post_init__(self) -> None:
        _one_of("resources.cluster", self.cluster, Cluster)
        if self.gpus is not None:
            _at_least("resources.gpus", self.gpus, 0)
        for name in ("nodes", "gpus_per_model"):
            _at_least(f"resources.{name}", getattr(self, name), 1)
        for name in ("tasks", "cpus_per_gpu", "cpus_per_task", "cells_per_job", "max_parallel_jobs", "batch_size"):
            if getattr(self, name) is not None:
                _at_least(f"resources.{name}", getattr(self, name), 1)
        if self.gpus_per_model > 1 and (not self.gpus or self.gpus % self.gpus_per_model):
            raise SpecError(
                f"resources.gpus_per_model={self.gpus_per_model}, but gpus={self.gpus}: set resources.gpus, the GPUs of a job on "
                f"each node, to a multiple of it, e.g. {-(-(self.gpus or 1) // self.gpus_per_model) * self.gpus_per_model}"
            )
        if self.mem_gb is not None and not (_is_number(self.mem_gb) and self.mem_gb > 0):
            raise SpecError(f"resources.mem_gb={self.mem_gb!r} must be a number of gigabytes > 0")
        if not isinstance(self.nice, bool):
            _at_least("resources.nice", self.nice, 0)
        if self.cpus_per_gpu is not None and self.gpus == 0:
            raise SpecError(f"resources.cpus_per_gpu={self.cpus_per_gpu}, but gpus=0: set resources.cpus_per_task")
        if self.cpus_per_task is not None and self.gpus:
            raise SpecError(f"resources.cpus_per_task={self.cpus_per_task} is for gpus=0: set resources.cpus_per_gpu")
        for key in self.extra:
            _refuse_own_option(key)
        _ = self.minutes

    @property
    def minutes(self) -> int:
        """Limit of one start of a job, minutes."""
        if isinstance(self.time, int) and not 0 < self.time <= LONGEST_PLAIN_MINUTES:
            # YAML reads an unquoted 24:00:00 as 86400.
            raise SpecError(f'resources.time={self.time} minutes: write a limit of more than a week as "D-HH:MM:SS", in quotes')
        return minutes(str(self.time), "resources.time")

    @property
    def niceness(self) -> int:
        """What `nice` comes to, 0 for none."""
        return int(self.nice) if not isinstance(self.nice, bool) else 10_000 * self.nice

    @property
    def whole_nodes(self) -> bool:
        """What `exclusive` comes to."""
        return self.exclusive if self.exclusive is not None else (self.gpus or 0) >= 8

    @property
    def setup_lines(self) -> list[str]:
        """Shell lines, one each."""
        return self.setup.splitlines() if isinstance(self.setup, str) else list(self.setup)


def _refuse_own_option(key: str) -> None:
    option = str(key).replace("_", "-").lstrip("-")
    # sbatch takes the beginning of an option for the whole: "comm" would be a comment.
    own = option if option in OWN_OPTIONS else next((o for o in OWN_OPTIONS if o.startswith(option)), None)
    if own is not None:
        raise SpecError(f"resources.extra has {key}: ksweep sets --{own} itself ({OWN_OPTIONS[own]}). Leave it out")


def minutes(text: str, name: str = "time") -> int:
    """A Slurm time limit in whole minutes, rounded up: 90, 90:00, 24:00:00, 2-12, 2-12:30, 2-12:30:00.

    Raises:
        SpecError: anything else.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip().strip("'\""))
    if not match:
        raise SpecError(f"{name}={text!r} is no Slurm time limit: expected minutes, MM:SS, HH:MM:SS or D-HH:MM:SS, e.g. 24:00:00")
    days, first, second, third = (int(part or 0) for part in match.groups())
    with_hours = match[1] is not None or match[4] is not None
    hours, mins, seconds = (first, second, third) if with_hours else (0, first, second)
    return max(1, days * 24 * 60 + hours * 60 + mins + math.ceil(seconds / 60))


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A question: one cell, and the values along which it is varied."""

    name: str
    cell: Cell
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Dotted field of the cell -> its values, e.g. {"sampling.temperature": (0.5, 1.0)}; cells are the product."""
    question: str = ""
    resources: Resources = field(default_factory=Resources)
    registry: str = "registry"
    """Directory of draws, landing files and the database."""
    vector_cache: str = "vector_cache"
    """Directory of the activation store."""
    export_json: str = ""
    """File that results also go to in the reference sweep's JSON schema; with several cells one for each, by its label."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise SpecError(f"sweep name {self.name!r} must be usable as a directory name, e.g. temp_sweep")
        for path, values in self.axes.items():
            if not isinstance(values, (tuple, list)):
                raise SpecError(
                    f"axis {path!r} of sweep {self.name!r} is {values!r}: give its values as a tuple, e.g. ({values!r},)"
                )
            if not values:
                raise SpecError(f"axis {path!r} of sweep {self.name!r} has no values")
        self.cells()

    def cells(self) -> list[Cell]:
        """The product of the axes, in order, duplicates left out."""
        out = []
        for values in itertools.product(*self.axes.values()):
            cell = self.cell
            for path, value in zip(self.axes, values, strict=True):
                cell = replace_at(cell, path, value)
            if cell not in out:
                out.append(cell)
        return out

    def labels(self) -> list[str]:
        """What tells the cells of this sweep apart, for legends: "temperature=0.5", "ar=untrained"."""
        fields_of = _axis_names(list(self.axes))
        texts = {path: _axis_texts(fields_of[path], values) for path, values in self.axes.items()}
        labels: dict[Cell, str] = {}
        for places in itertools.product(*(range(len(values)) for values in self.axes.values())):
            cell = self.cell
            for (path, values), place in zip(self.axes.items(), places, strict=True):
                cell = replace_at(cell, path, values[place])
            label = ", ".join(filter(None, (texts[path][place] for path, place in zip(self.axes, places, strict=True))))
            labels.setdefault(cell, label or self.name)
        again = repeated(list(labels.values()))
        return [f"{text} #{i}" if text in again else text for i, text in enumerate(labels.values())]


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


def _axis_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted path; all of it where two end alike."""
    last = [path.rpartition(".")[2] for path in paths]
    again = repeated(last)
    return {path: path if name in again else name for path, name in zip(paths, last, strict=True)}


def _axis_texts(name: str, values: Sequence[Any]) -> list[str]:
    """What tells the values of an axis apart: numbers and words themselves, of whole parts of a cell the fields that differ."""
    if not all(is_dataclass(value) for value in values):
        return [f"{name}={text}" for text in _value_texts(name, values)]
    if all(isinstance(value, Autoencoder) for value in values):
        sources = short_names([value.source for value in values])
        if len(set(sources)) == len(set(values)):
            return [f"{name}={source}" for source in sources]
    parts: list[list[str]] = [[] for _ in values]
    for field_name in (f.name for f in fields(values[0])):
        column = [getattr(value, field_name) for value in values]
        for at, (value, text) in enumerate(zip(column, _value_texts(field_name, column), strict=True)):
            parts[at] += [f"{field_name}={text}"] if value is not None and len(set(column)) > 1 else []
    return [", ".join(part) for part in parts]


def _value_texts(name: str, values: Sequence[Any]) -> list[str]:
    """Values as short as tells them apart; paths by their last parts."""
    if name.rpartition(".")[2] in PATHS:
        known = [value for value in values if value is not None]
        texts = dict(zip(known, short_names(known), strict=True)) if known else {}
        return [texts.get(value, str(value)) for value in values]
    return [f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value) for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(name: str, value: object, options: Any) -> None:
    valid: tuple[object, ...] = options.__args__
    if value not in valid:
        raise SpecError(f"{name}={value!r} is not one of {', '.join(map(str, valid))}")


def _at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SpecError(f"{name}={value!r} must be a whole number >= {low}")
