"""The spec of a measurement, as frozen dataclasses. A `Cell` holds everything that changes its numbers, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from ksweep.config.validation import LARGEST_SEED, at_least, is_number, is_seed, list_of_texts, one_of, sorted_pairs
from ksweep.utils.errors import SpecError
from ksweep.utils.fingerprint import canonical_json
from ksweep.utils.text import bounded_repr

if TYPE_CHECKING:
    from ksweep.stats import BaselineKind

Dtype = Literal["bfloat16", "float16", "float32"]
RowRule = Literal["random", "first"]
PositionRule = Literal["random", "midpoint", "last", "all", "stride", "turn_ends", "prompt_end"]
SpokenRole = Literal["user", "assistant", "system", "other"]
Candidates = Literal["not_special", "not_padding"]
SelectionRule = Literal["order_statistics", "prefix"]
MeasuredBaseline = Literal["between_documents", "distance_from_mean"]
"""Baselines that are measured on the evaluated activations."""
EncoderPrompt = Literal["learned", "text"]
OWN_GROUPINGS = ("all", "document", "role", "position", "norm")
"""Breakdowns that every run has, so that no column of a text may be shown under their names."""
AR_FIELDS = ("ar", "ar_dtype", "encoder_prompt")
"""Fields of an autoencoder that its AV does not depend on."""
AV_FIELDS = ("av", "av_stack", "dtype", "texts", "texts_column", "max_text_tokens", "kept_tokens")
"""Fields that its AR does not depend on; `reconstructor_dtype` stands for the precision."""
OF_TEXTS = ("max_norm", "roles", "chat_arguments", "system_prompt", "adapter_base")
"""Fields of activations that say how texts become activations, and do nothing to ready-made vectors."""
OF_VECTORS = ("vector_column", "row_id_column")
"""Fields of activations that say how ready-made vectors are read."""
MOST_ACTIVATIONS = 1_000_000_000
MOST_CELL_DRAWS = 1_000_000_000
"""Most draws of a cell, over all its activations: planning holds a byte for each."""
LARGEST_K = 1_000_000
"""Most draws of an activation: every K up to it is reported."""
MOST_REPLICATES = 1_000_000
"""Most bootstrap replicates: each holds a number for every document."""
LONGEST_TEXT = 10_000_000
"""Most tokens of an explanation or a row of text."""

InjectionKind = Literal["replace_embedding", "add_after_block"]
TextEnd = Literal["first", "last"]
LayoutName = Literal["kitft", "easynla", "nla-at-home"]
"""Trainers of NLA pairs, by whose rules a checkpoint is prompted and read (docs/layouts.md)."""


@dataclass(frozen=True, kw_only=True)
class PromptingOverrides:
    """How an NLA pair is prompted, where that is not as its sidecars say. None: as the checkpoint says."""

    injection: InjectionKind | None = None
    """Where the vector enters the AV. replace_embedding: in place of the marker's embedding row, scaled to injection_scale.
    add_after_block: added to the output of block injection_block at the marker, scaled to the norm of that output."""
    injection_block: int | None = None
    """Block of "add_after_block", 0-based."""
    injection_scale: float | None = None
    """Norm of the row of "replace_embedding", > 0."""
    av_template: str | None = None
    """User message of the AV, with {injection_char} where the marker goes."""
    marker: str | None = None
    """Character that stands where the vector goes; the AV's tokenizer must have it as one token."""
    chat_arguments: Mapping[str, Any] | None = None
    """Arguments of the AV's chat template, such as {enable_thinking: false}."""
    prefill: str | None = None
    """Beginning of the AV's answer that is already in the prompt."""
    opening_tag: str | None = None
    """What an explanation follows in an answer. Empty: it begins with the answer."""
    closing_tag: str | None = None
    """What ends an explanation. Empty: it ends with the answer, also where that was cut off."""
    stop_tokens: tuple[str, ...] | None = None
    """Tokens that end an answer, in place of the model's end-of-sequence tokens."""
    ar_template: str | None = None
    """Prompt of the AR, with {explanation} where the text goes; doubled braces stand for single ones."""
    ar_special_tokens: bool | None = None
    """Whether the AR's tokenizer adds its special tokens (a BOS) to the prompt."""
    ar_readout: int | None = None
    """Token of the AR's prompt that is read, counted from the end: -1 is the last one."""

    def __post_init__(self) -> None:
        if self.chat_arguments is not None:  # sorted pairs, so that a spec can be hashed
            object.__setattr__(self, "chat_arguments", sorted_pairs("autoencoder.prompting.chat_arguments", self.chat_arguments))
        if self.stop_tokens is not None:
            object.__setattr__(self, "stop_tokens", list_of_texts("autoencoder.prompting.stop_tokens", self.stop_tokens) or None)
        for name in ("av_template", "marker", "prefill", "opening_tag", "closing_tag", "ar_template"):
            if (value := getattr(self, name)) is not None and not isinstance(value, str):
                raise SpecError(f"autoencoder.prompting.{name}={bounded_repr(value)} must be text")
        if self.injection is not None:
            one_of("autoencoder.prompting.injection", self.injection, InjectionKind)
        if (self.injection == "add_after_block") != (self.injection_block is not None):
            raise SpecError(
                f"autoencoder.prompting.injection={self.injection!r} with injection_block={bounded_repr(self.injection_block)}: "
                "add_after_block needs the number of a block, and nothing else takes one"
            )
        if self.injection_block is not None:
            at_least("autoencoder.prompting.injection_block", self.injection_block, 0)
        if self.injection_scale is not None:
            if not (is_number(self.injection_scale) and self.injection_scale > 0):
                raise SpecError(
                    f"autoencoder.prompting.injection_scale={bounded_repr(self.injection_scale)} must be a number > 0"
                )
            if self.injection == "add_after_block":
                raise SpecError("autoencoder.prompting.injection_scale is for replace_embedding; add_after_block takes no scale")
        if self.ar_readout is not None and (not isinstance(self.ar_readout, int) or not -LONGEST_TEXT <= self.ar_readout < 0):
            raise SpecError(
                f"autoencoder.prompting.ar_readout={bounded_repr(self.ar_readout)} must be a whole number < 0: -1 is the last "
                "token"
            )

    def __hash__(self) -> int:  # arguments of a chat template may be lists, which have no hash
        return hash(canonical_json(self._stated()))

    @property
    def of_av(self) -> dict[str, Any]:
        """What is overridden in the AV: it changes draws."""
        return {name: value for name, value in self._stated().items() if not name.startswith("ar_")}

    @property
    def of_ar(self) -> dict[str, Any]:
        """What is overridden in the AR: it changes scores."""
        return {name: value for name, value in self._stated().items() if name.startswith("ar_")}

    def _stated(self) -> dict[str, Any]:
        """Return the fields that are not None as JSON has them."""
        values = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        plain = {"chat_arguments": dict, "stop_tokens": list}
        return {name: plain[name](value) if name in plain else value for name, value in values.items()}


AS_THE_CHECKPOINT_SAYS = PromptingOverrides()
"""No overrides."""


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """An activation verbalizer (AV) and the reconstructor (AR) trained with it: a public NLA pair, or a talkative autoencoder."""

    av: str | None = None
    """Activation verbalizer: a directory of a pair of kitft, EasyNLA or nla-at-home (docs/layouts.md), a hub id ("owner/name",
    "owner/name@revision/folder": docs/checkpoints.md), or "package.module:name" of a class of your own (docs/extending.md). An
    unknown key in its sidecar nla_meta.yaml is an error that names the key (docs/sidecars.md)."""
    ar: str | None = None
    """Activation reconstructor: a directory, a hub id or a class of your own, as for `av`; the two may be mixed."""
    checkpoint: str | None = None
    """A talkative-autoencoder .pt file, or a directory of which the file with the highest step is taken; instead of av and ar."""
    texts: str | None = None
    """File of texts that are scored in place of an AV's draws, with `ar` or `checkpoint` and without `av` (docs/scoring.md):
    .jsonl or .parquet, a row for each text, which names its activation by row_id and, where a row has several, position."""
    texts_column: str | None = None
    """Column of `texts` that holds the texts. None: "explanation" if the file has it, as exported draws do, else "text"."""
    max_text_tokens: int | None = None
    """Longest text of `texts`, in tokens of the AR's tokenizer; longer ones are cut. An AR of your own counts words. None keeps
    texts whole."""
    kept_tokens: TextEnd = "first"
    """Which tokens `max_text_tokens` keeps: the first or the last of a text."""
    base: str | None = None
    """Base model (path or hub id) under adapters, an AR that is a head alone, or a talkative autoencoder. None: the model that
    the checkpoint names."""
    layout: LayoutName | None = None
    """Trainer by whose rules both halves of a pair are prompted and read (docs/layouts.md). None: recognised from their files."""
    av_stack: tuple[str, ...] = ()
    """What lies between `base` and the adapter `av`, first on the base: adapters that are applied before it, such as the SFT
    adapter under one of RL; the first may be a directory of merged weights, which takes the place of the base. Files do not say
    whether an adapter was trained on top of another or continues it."""
    layer: int | None = None
    """Layer of a pair that was trained for all layers; any other pair states its own."""
    whitening: str | None = None
    """Statistics file (.npz) of a pair that was trained on whitened activations. None: the file that its sidecar names, beside
    it."""
    dtype: Dtype = "bfloat16"
    """Compute precision of AV and AR; errors are always computed in float32. In float32 draws do not depend on batch size or
    number of ranks. In bfloat16 rounding can change a draw when either changes (see Resources.batch_size)."""
    ar_dtype: Dtype | None = None
    """Compute precision of the AR alone. None: that of `dtype`. Draws do not depend on it, so they are not taken again."""
    encoder_prompt: EncoderPrompt = "learned"
    """What surrounds an explanation in a talkative autoencoder's encoder. learned: the trained soft prompt. text: the token
    embeddings of the words that this prompt was initialised with (soft_prompt_init_text)."""
    prompting: PromptingOverrides = field(default_factory=PromptingOverrides)
    """How an NLA pair is prompted and read, where that is not as its sidecars say (docs/sidecars.md)."""

    def __post_init__(self) -> None:
        if isinstance(self.prompting, Mapping):  # as JSON and YAML have it
            object.__setattr__(self, "prompting", PromptingOverrides(**self.prompting))
        one_of("autoencoder.dtype", self.dtype, Dtype)
        if self.ar_dtype is not None:
            one_of("autoencoder.ar_dtype", self.ar_dtype, Dtype)
        one_of("autoencoder.encoder_prompt", self.encoder_prompt, EncoderPrompt)
        object.__setattr__(self, "av_stack", list_of_texts("autoencoder.av_stack", self.av_stack))
        if self.layout is not None:
            one_of("autoencoder.layout", self.layout, LayoutName)
        if self.layer is not None:
            at_least("autoencoder.layer", self.layer, 0)
        if self.whitening is not None and not isinstance(self.whitening, str):
            raise SpecError(f"autoencoder.whitening={bounded_repr(self.whitening)} must be the path of a file (.npz)")
        self._check_texts()
        halves = (self.av or self.texts, self.ar)
        if (None in halves) == (self.checkpoint is None) or (self.checkpoint and (self.av or self.ar)):
            raise SpecError(
                f"an autoencoder is either a pair (av={self.av!r}, ar={self.ar!r}) or one file (checkpoint={self.checkpoint!r}): "
                f"set autoencoder.av and autoencoder.ar, or autoencoder.checkpoint{self._remedy_for_texts}"
            )
        if self.encoder_prompt != "learned" and self.checkpoint is None:
            raise SpecError(
                f"autoencoder.encoder_prompt={self.encoder_prompt!r} is for a talkative autoencoder's encoder, and the AR of an "
                f"NLA pair ({self.ar}) has no trained prompt: leave it out, or set autoencoder.checkpoint"
            )

    @property
    def _remedy_for_texts(self) -> str:
        return "" if self.texts is None else f"; texts ({self.texts}) are read by autoencoder.ar or the encoder of a checkpoint"

    def _check_texts(self) -> None:
        one_of("autoencoder.kept_tokens", self.kept_tokens, TextEnd)
        if self.max_text_tokens is not None:
            at_least("autoencoder.max_text_tokens", self.max_text_tokens, 1)
        if self.texts is not None and self.av is not None:
            raise SpecError(
                f"autoencoder.texts={self.texts} are scored in place of the draws of an AV, and autoencoder.av={self.av}: leave "
                "one of the two out"
            )
        if self.texts is None and (self.texts_column, self.max_text_tokens) != (None, None):
            raise SpecError(
                f"autoencoder.texts_column={self.texts_column!r} and max_text_tokens={self.max_text_tokens!r} are of given "
                "texts: set autoencoder.texts, or leave them out (sampling.max_new_tokens limits the draws of an AV)"
            )

    def without_effect(self, *names: str) -> str | None:
        """Return the first of these fields that is set, as `name=value`; None if each has its default."""
        values = {name: getattr(self, name) for name in names}
        return next(
            (f"autoencoder.{name}={bounded_repr(value)}" for name, value in values.items() if value not in (None, ())), None
        )

    @property
    def source(self) -> str:
        """Path or hub id by which a user knows the autoencoder: the texts, the checkpoint, or the AV."""
        return self.texts or self.checkpoint or self.av or ""

    @property
    def reconstructor_dtype(self) -> Dtype:
        """Compute precision of the AR."""
        return self.ar_dtype or self.dtype

    @property
    def av_values(self) -> tuple[Any, ...]:
        """Values of the fields that its AV depends on: autoencoders with the same ones have the same AV.

        Where texts stand in place of an AV these are the values of the AR, which is then all that is loaded.
        """
        if self.texts is not None:
            return ("texts", *self.ar_values)
        names = [f.name for f in fields(self) if f.name not in (*AR_FIELDS, "prompting")]
        return (*(getattr(self, name) for name in names), canonical_json(self.prompting.of_av))

    @property
    def ar_values(self) -> tuple[Any, ...]:
        """Values of the fields that its AR depends on."""
        names = [f.name for f in fields(self) if f.name not in (*AV_FIELDS, "ar_dtype", "prompting")]
        return (*(getattr(self, name) for name in names), self.reconstructor_dtype, canonical_json(self.prompting.of_ar))


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The vectors to explain: from a base model at one layer, run over a text, at chosen positions; or ready-made vectors."""

    model: str | None = None
    """Base language model: path or hub id. None: the model that a talkative autoencoder names; `vectors` need none. A fine-tune
    of the pair's base, or a LoRA adapter over it, is noted in the run record; another architecture or size is an error."""
    adapter_base: str | None = None
    """Path or hub id of the model under `model`, if that is a LoRA adapter. None: the one that its adapter_config.json names."""
    layer: int | None = None
    """Block whose output is taken, 0-based (= hidden_states[layer + 1]). None: the layer that the autoencoder was trained on."""
    text: str | None = None
    """A .txt file (one document per paragraph; blank lines separate paragraphs), .jsonl, .parquet, a `datasets` directory, a
    hub dataset id, or "package.module:name" of a function that gives rows (docs/extending.md). Text that already begins with the
    model's BOS, as chat templates write it, gets no second BOS; either all rows begin with it or none."""
    text_column: str = "text"
    """Column of texts; of conversations (lists of messages with role and content), which the base model's chat template writes,
    with exactly one BOS; or of lists of token ids, which are used unchanged: padding (the tokenizer's pad id, else EOS) at either
    end is masked and skipped, positions are indices into the padded row, and min_position counts from the first real token."""
    chat_arguments: Mapping[str, Any] | None = None
    """Arguments of the base model's chat template for conversations, such as {enable_thinking: false, add_generation_prompt:
    true}; it must know each of them. None: its defaults. Where a template writes today's date it gets 26 July 2024."""
    system_prompt: str | None = None
    """System message of conversations that have none of their own."""
    text_split: str = "train"
    """Split of a hub dataset or a `datasets` directory of several splits."""
    document_column: str | None = None
    """Column that names the document of each row; the bootstrap resamples documents. None: the column "document" (of vectors
    "doc_id", else "document") if it exists, otherwise each row is its own document."""
    vectors: str | None = None
    """Ready-made vectors, instead of model and text: a .parquet file as in the public NLA datasets, a directory or pattern of
    such parts, a hub data set, a .npy, .npz, .safetensors or .pt array, each with `@[0:1000]` behind it for a range of its rows
    (docs/activations.md). A sidecar FILE.nla_meta.yaml must state raw vectors (norm: none) of the pair's layer."""
    vector_column: str | None = None
    """Column or tensor of `vectors` that holds them. None: activation_vector, activations, vectors, reconstructions, W_dec (the
    decoder of a sparse autoencoder), or the only one that can."""
    row_id_column: str | None = None
    """Column of `vectors` that names each activation, for `autoencoder.texts`, groups and exports. Rows after the first of a name
    are left out: they hold further texts of the same activation. None: every row is an activation, named "row:0", "row:1", ..."""
    rows: RowRule = "random"
    """Which rows of the text activations come from. random: rows in an order that the seed, their document and their row id
    decide, so that any number of activations is a sample of the whole text; of a hub dataset, which is streamed, of its first
    10,000 rows, then of the next 10,000. first: rows as they stand in the text."""
    num_activations: int = 1000
    """Activations to explain, at least 2 unless scoring.baseline is a number: rows are taken one after the other, each with all
    of its positions, until there are as many. More can be added later: the first ones stay."""
    positions: PositionRule = "random"
    """Which allowed positions of a row are taken. random: `positions_per_document` of them, seeded by row. midpoint: the middle
    one. last: the last one. all: every one. stride: every `stride`-th. turn_ends: the last token of each message. prompt_end: of
    a conversation without its last answer the last token, at which the model begins to answer; also a special one. The last two
    take nothing of what max_length may have cut: of a row of so many tokens no prompt, and not the last message."""
    roles: tuple[SpokenRole, ...] = ()
    """Allow only tokens of messages of these roles: ("assistant",). Of conversations, or of texts and token ids in a chat format
    that is known (Gemma, ChatML, Llama 3, Harmony). Empty: every token."""
    candidates: Candidates = "not_special"
    """Which positions are allowed. not_special: indices from min_position on whose token is not special. not_padding (the rule of
    the talkative autoencoder): every real token from the min_position-th on, special ones included; a shorter row gives its
    last."""
    positions_per_document: int = 1
    """Distinct positions per row of text under "random"; the other rules ignore it."""
    min_position: int = 50
    """First allowed position, tokens: earlier ones have little context (50 is the public NLA rule)."""
    stride: int = 16
    """Distance between neighbouring positions under "stride", tokens."""
    max_length: int = 2048
    """Texts are cut to this many tokens. Rows of token ids must fit without their right padding."""
    max_norm: float | None = None
    """Largest L2 norm of an extracted activation; longer ones are left out. None keeps all."""
    seed: int = 42
    """Seed of rows=random and of positions=random; the other rules ignore it."""
    dtype: Dtype = "bfloat16"
    """Compute precision of the base model, and precision of the vectors on disk."""

    def __post_init__(self) -> None:
        one_of("activations.rows", self.rows, RowRule)
        one_of("activations.positions", self.positions, PositionRule)
        self._check_chat()
        one_of("activations.candidates", self.candidates, Candidates)
        one_of("activations.dtype", self.dtype, Dtype)
        if self.max_norm is not None and not (is_number(self.max_norm) and self.max_norm > 0):
            raise SpecError(f"activations.max_norm={bounded_repr(self.max_norm)} must be a number > 0, or None to keep all")
        self._check_source()
        at_least("activations.num_activations", self.num_activations, 1, MOST_ACTIVATIONS)
        at_least("activations.positions_per_document", self.positions_per_document, 1)
        at_least("activations.min_position", self.min_position, 0)
        at_least("activations.stride", self.stride, 1)
        at_least("activations.max_length", self.max_length, 1, LONGEST_TEXT)
        is_seed("activations.seed", self.seed, -LARGEST_SEED)
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

    def _check_source(self) -> None:
        """Refuse settings of texts beside vectors and of vectors beside a text; model and text give way to vectors."""
        if self.vectors is not None:
            chosen = [name for name in OF_TEXTS if getattr(self, name) not in (None, ())]
            chosen += [f"positions={self.positions}"] if self.positions in ("turn_ends", "prompt_end") else []
            if chosen:
                raise SpecError(
                    f"activations.{chosen[0]} is for activations extracted from text, and activations.vectors={self.vectors} are "
                    "ready-made: leave it out, and choose vectors by the file or a range of it (@[0:1000])"
                )
        elif chosen := [name for name in OF_VECTORS if getattr(self, name) is not None]:
            named = " (a text's rows are named by its column row_id)" if chosen[0] == "row_id_column" else ""
            raise SpecError(
                f"activations.{chosen[0]}={getattr(self, chosen[0])!r} is a column of ready-made vectors{named}: leave it "
                "out, or set activations.vectors"
            )

    def _check_chat(self) -> None:
        if self.chat_arguments is not None:  # sorted pairs, so that a spec can be hashed
            pairs = sorted_pairs("activations.chat_arguments", self.chat_arguments)
            if wrong := [name for name, value in pairs or () if not isinstance(value, (str, bool, int, float, type(None)))]:
                raise SpecError(f"activations.chat_arguments.{wrong[0]} must be a text, a number, true or false")
            object.__setattr__(self, "chat_arguments", pairs)
        roles = list_of_texts("activations.roles", self.roles)
        for role in roles:
            one_of("activations.roles", role, SpokenRole)
        object.__setattr__(self, "roles", tuple(sorted(set(roles))))
        if roles and self.positions == "prompt_end":
            raise SpecError(
                f"activations.roles={list(roles)} and positions=prompt_end, whose token is of no message: leave one out"
            )
        begins = dict(self.chat_arguments or ()).get("add_generation_prompt", True)
        if begins is not True and self.positions == "prompt_end":
            raise SpecError(
                f"activations.chat_arguments has add_generation_prompt={begins!r}, and positions=prompt_end takes the end of the "
                "generation prompt: leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How explanations are sampled."""

    temperature: float = 1.0
    """Sampling temperature, at least 0. 0 is greedy: every draw would be the same, so a single one is taken."""
    top_p: float = 1.0
    """Nucleus sampling: draw from the smallest set of tokens with at least this probability, in (0, 1]. 1 keeps all tokens."""
    max_new_tokens: int = 200
    """Longest explanation, tokens; longer ones are cut off. A checkpoint always writes the length that it was trained with."""
    num_draws: int = 16
    """Explanations per activation; every K up to this is read off the same draws. Of given texts (autoencoder.texts) the default
    takes as many as every activation of the file has."""
    seed: int = 0
    """Draw k of an activation depends on this seed, the activation and k alone; in float32 also bit for bit on any number of
    ranks."""
    engine: str = "builtin"
    """What samples from the AV. builtin: prompts run once, draws share what they have in common. naive: its slow oracle.
    vllm: for NLA pairs, also such as need several GPUs (docs/engines.md). Or an engine of one's own, "package.module:name"
    (CONTRIBUTING.md)."""

    def __post_init__(self) -> None:
        if not (is_number(self.temperature) and self.temperature >= 0):
            raise SpecError(f"sampling.temperature={bounded_repr(self.temperature)} must be a finite number >= 0 (0 is greedy)")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise SpecError(f"sampling.top_p={bounded_repr(self.top_p)} must lie in (0, 1]; 1 keeps every token")
        at_least("sampling.max_new_tokens", self.max_new_tokens, 1, LONGEST_TEXT)
        at_least("sampling.num_draws", self.num_draws, 1, LARGEST_K)
        is_seed("sampling.seed", self.seed)

    @property
    def effective_num_draws(self) -> int:
        """Number of draws actually taken: one when greedy, since all draws would be equal."""
        return 1 if self.temperature == 0 else self.num_draws


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How draws become a curve of FVE over K."""

    ks: tuple[int, ...] | None = None
    """Values of K to report, 1 to num_draws. None reports every one."""
    baseline: float | MeasuredBaseline | None = None
    """Error at which FVE is 0. between_documents (also None): half the mean squared distance between evaluated activations of
    different documents (for a pair, after scaling). distance_from_mean: the mean squared distance from the evaluated set's own
    mean, as in the public code; biased low with few or uneven documents. A number > 0 states it (the released pairs quote 0.7335,
    0.0302, ...)."""
    failed_error: float = 2.0
    """Error of an activation whose draws all failed, > 0: 2 is that of an orthogonal reconstruction. A checkpoint's draws never
    fail."""
    selection: SelectionRule = "order_statistics"
    """Which K draws the best is taken from. order_statistics: every choice of K draws, averaged. prefix: the first K, as in the
    reference."""
    level: float = 0.95
    """Coverage of the intervals, between 0 and 1."""
    num_replicates: int = 2000
    """Bootstrap replicates over documents, at least 2."""
    seed: int = 0
    """Seed of the bootstrap."""
    groups: tuple[str, ...] = ()
    """Columns of the text (or of the file of vectors) by which the FVE is broken down too, as it is by role, position and norm:
    ("language",). Their values are looked up when statistics are computed; rows without one are left out of the groups."""
    metrics: tuple[str, ...] = ()
    """Metrics of draws beside the AR's error: "text" (length, distinct words, overlap with the context), or one of your own as
    "package.module:name". They are computed when the cell is recorded; `ksweep scores compute` does so later."""
    reference_replicates: int = 0
    """Replicates of the reference's own bootstrap over single vectors (percentile and BCa intervals, seed 42; the reference took
    1000). Needs a checkpoint. 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.ks is not None:
            if not isinstance(self.ks, (tuple, list)):
                raise SpecError(f"scoring.ks={self.ks!r} must be a list of whole numbers, e.g. (1, 2, 4, 8)")
            if not self.ks:
                raise SpecError("scoring.ks is empty; leave it out (every K), or name at least one, e.g. scoring.ks=[1,2,4,8]")
            for k in self.ks:
                at_least("scoring.ks", k, 1)
            object.__setattr__(self, "ks", tuple(sorted(set(self.ks))))
        object.__setattr__(self, "groups", tuple(dict.fromkeys(list_of_texts("scoring.groups", self.groups))))
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(list_of_texts("scoring.metrics", self.metrics))))
        if taken := [name for name in self.groups if name in OWN_GROUPINGS]:
            raise SpecError(
                f"scoring.groups has {taken[0]!r}, which is a breakdown of every run ({', '.join(OWN_GROUPINGS)}): give the "
                "column of the text another name, or leave it out"
            )
        if self.baseline == "between_documents":  # one spelling, so that both are one cell
            object.__setattr__(self, "baseline", None)
        measured = self.baseline is None or self.baseline in get_args(MeasuredBaseline)
        if not measured and not (is_number(self.baseline) and self.baseline > 0):  # type: ignore[operator]
            raise SpecError(
                f"scoring.baseline={bounded_repr(self.baseline)} must be a number > 0, or one of "
                f"{', '.join(get_args(MeasuredBaseline))}, which measure it on the evaluated set"
            )
        one_of("scoring.selection", self.selection, SelectionRule)
        if not (is_number(self.level) and 0 < self.level < 1):
            raise SpecError(f"scoring.level={bounded_repr(self.level)} must lie between 0 and 1, e.g. 0.95")
        at_least("scoring.num_replicates", self.num_replicates, 2, MOST_REPLICATES)
        is_seed("scoring.seed", self.seed)
        at_least("scoring.reference_replicates", self.reference_replicates, 0, MOST_REPLICATES)
        if self.reference_replicates == 1:
            raise SpecError(
                "scoring.reference_replicates=1 has no spread: ask for at least 2 (the reference had 1000), or 0 for none"
            )
        if not (is_number(self.failed_error) and self.failed_error > 0):
            raise SpecError(
                f"scoring.failed_error={bounded_repr(self.failed_error)} must be a number > 0 (2.0 counts a failure as "
                "orthogonal)"
            )

    @property
    def stated_baseline(self) -> float | None:
        """The baseline if the spec states it as a number; None if it is measured."""
        return cast("float", self.baseline) if is_number(self.baseline) else None

    @property
    def baseline_kind(self) -> BaselineKind:
        """Kind of the baseline, in the words of the registry."""
        if self.stated_baseline is not None:
            return "stated constant"
        return "distance from mean" if self.baseline == "distance_from_mean" else "between documents"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of a sweep: everything that changes its numbers, and nothing else."""

    autoencoder: Autoencoder
    """AV and AR."""
    activations: Activations
    """Which vectors are explained."""
    sampling: Sampling = field(default_factory=Sampling)
    """How explanations are sampled from the AV."""
    scoring: Scoring = field(default_factory=Scoring)
    """How the draws are scored and the curve is reported."""

    def __post_init__(self) -> None:
        ks, num_draws = self.scoring.ks, self.sampling.num_draws
        if ks is not None and max(ks) > num_draws:
            raise SpecError(
                f"scoring.ks asks for K={max(ks)} but sampling.num_draws={num_draws}: best-of-K needs at least K draws. "
                f"Raise sampling.num_draws to {max(ks)} or leave out the larger K."
            )
        activations, draws = self.activations.num_activations, self.sampling.effective_num_draws
        if activations * draws > MOST_CELL_DRAWS:
            raise SpecError(
                f"activations.num_activations={activations:,} with sampling.num_draws={num_draws:,} are {activations * draws:,} "
                f"draws, and a cell holds at most {MOST_CELL_DRAWS:,}: lower one of the two, or split it over several seeds"
            )
        baseline = self.scoring.stated_baseline
        if self.activations.num_activations < 2 and baseline is None:
            raise SpecError(
                "activations.num_activations=1 has no variance to explain: ask for more activations, or state scoring.baseline"
            )
        asked, n = self.scoring.reference_replicates, self.activations.num_activations
        if asked and n < 3:
            raise SpecError(
                f"scoring.reference_replicates={asked} needs at least 3 activations, and activations.num_activations={n}: ask "
                "for more, or leave it out (0)"
            )

    @property
    def ks(self) -> tuple[int, ...]:
        """Every K that is reported. A greedy cell has one draw, so K = 1."""
        n = self.sampling.effective_num_draws
        asked = self.scoring.ks if self.scoring.ks is not None else range(1, n + 1)
        return tuple(k for k in asked if k <= n) or (1,)


def cell_from_dict(value: Mapping[str, Any]) -> Cell:
    """Return the cell that `dataclasses.asdict` wrote; JSON has turned its tuples into lists.

    Cells that earlier versions wrote name no row rule: their activations come from the first rows.
    """
    scoring = dict(value["scoring"])
    if scoring.get("ks") is not None:
        scoring["ks"] = tuple(scoring["ks"])
    return Cell(
        autoencoder=Autoencoder(**value["autoencoder"]),
        activations=Activations(**{"rows": "first", **value["activations"]}),
        sampling=Sampling(**value["sampling"]),
        scoring=Scoring(**scoring),
    )


def replace_at(spec: Any, path: str, value: Any) -> Any:
    """Return a copy of a nested spec with the field at a dotted path changed: `replace_at(cell, "sampling.seed", 1)`."""
    head, _, rest = path.partition(".")
    if not is_dataclass(spec) or head not in {f.name for f in fields(spec)}:
        names = ", ".join(f.name for f in fields(spec)) if is_dataclass(spec) else "nothing below it"
        raise SpecError(f"{type(spec).__name__} has no field {head!r}; it has {names}")
    changed = replace_at(getattr(spec, head), rest, value) if rest else value
    return replace(spec, **{head: changed})  # type: ignore[type-var]
