"""Which keys of a sidecar are understood: read, equal to what is done anyway, or informational. Everything else is refused.

A sidecar is somebody else's file. A key that is dropped may have said how vectors were made, how a prompt is built or where a
reading is taken, and the numbers would be wrong without a word. So a key is accepted only if it

    says nothing (null),
    is read (`understood`, given by the reader),
    asks for what is done anyway (`ALREADY_SO`, e.g. `norm: none`), or
    informs (`INFORMATIONAL`, `INFORMATIONAL_PATTERN`, `informs` of the reader); inside such a section only `CHANGES` are judged.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ksweep.utils.hub import HUB_ID
from ksweep.utils.notes import Note

Refuse = Callable[[str], Exception]
"""Makes the error to raise of a message."""

LARGEST = 1_000_000
"""Bytes; public sidecars have 2,000 to 4,000."""

LAYER_KEYS = (
    "critic.extraction_layer_index",
    "critic.num_hidden_layers",  # schema 1: the value is L, not L + 1
    "ar.num_hidden_layers",
    *(
        f"{section}{key}"
        for section in ("", "extraction.", "critic.", "ar.", "av.", "actor.", "training.")
        for key in ("extraction_layer_index", "extraction_layer", "layer_index", "layer_idx", "layer")
        if f"{section}{key}" != "critic.extraction_layer_index"
    ),
)
"""Where a sidecar says L."""
LAYER_NAMES = frozenset({"extraction_layer_index", "extraction_layer", "layer_index", "layer_idx", "layer"})
"""Names that say it wherever they stand; `layer` not below `RESULTS`, which may be of any layer."""
RESULTS = frozenset({"baseline", "eval", "evaluation", "fve", "loss", "losses", "metrics", "results", "scores"})
"""Sections and keys of what was measured."""
BASE_KEYS = ("base_checkpoint", "base_model", "extraction.base_model")
OF_TRAINING = re.compile(
    r"^(?:\w+[_-])?(?:outputs?|out|checkpoints?|ckpts?|runs?|models|results|exps?|experiments?|logs?|saves?|saved|tmp|work"
    r"|workspace|scratch|weights|artifacts|train|training)/[\w.-]+$"
    r"|/(?:(?:global_)?step|iter|epoch|ckpt|checkpoint|run)[-_]?\d+$",
    re.IGNORECASE,
)
"""Relative paths of training runs, which look like hub ids."""

RAW = (False, "", "none", "null", "raw", "no", "off")
"""What is said of vectors as block L gives them, of `norm` and `whitening`."""
RESIDUAL = ("resid_post", "hook_resid_post", "residual", "residual_stream", "block_output")
"""The output of a block."""
ALREADY_SO: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("norm", "normalize", "normalized", "normalization", "normalisation", "activation_normalization"), RAW),
    **dict.fromkeys(("whiten", "whitened", "whitening", "whitening_method", "pca_whiten", "is_whitened"), (*RAW, {}, [])),
    "variant": (False, "", "none", "null"),
    **dict.fromkeys(("mean_subtract", "center", "centered", "ar_fresh_block"), (False,)),
    **dict.fromkeys(("pca_drop_top", "min_layer"), (0,)),
    **dict.fromkeys(("n_slots", "num_slots", "num_vectors", "n_vectors"), (1,)),
    **dict.fromkeys(("hook_point", "site", "activation_site", "stream", "component", "target", "tap"), RESIDUAL),
    "pooling": (False, "", "none"),
    "head_type": ("linear",),
    "head_bias": (False,),
    "format": ("parquet", "json", "jsonl", "csv", "arrow", "safetensors", "txt", "text"),
    "mode": ("train", "training", "sft", "rl", "lora", "full", "online", "offline", "disabled"),
    **dict.fromkeys(("checkpoints", "layers", "depth_percentages"), ([], {})),
    **dict.fromkeys(("prefill", "assistant_prefill", "actor_prefill", "prompt_prefill"), ("", False, [])),
    **dict.fromkeys(("enable_thinking", "add_generation_prompt", "final_norm_stripped"), (True,)),
    **dict.fromkeys(("chat_template", "apply_chat_template", "use_chat_template"), (True,)),
    **dict.fromkeys(("chat_template_kwargs", "chat_template_args", "chat_kwargs", "chat"), ({}, [])),
    **dict.fromkeys(("injection", "injection_mode", "injection_method", "injection_type"), ("replace", "normalize")),
    **dict.fromkeys(("injection_site", "injection_layer"), ("embedding", "embeddings")),
}
"""Values of keys (wherever they stand) that ask for what is done: raw vectors, one marker whose embedding row is replaced by the
vector at norm injection_scale, the chat template as it renders by default, an AR that is read before the final norm.
`enable_thinking` is compared with the rendered prompt once there is a tokenizer."""

ARGUMENTS = ("chat_template_kwargs", "chat_template_args", "chat_kwargs", "chat", "injection", "prompting")
"""Mappings of which every entry must be understood."""

CHANGES = re.compile(
    r"inject|whiten|prefill|think|reasoning|variant|template|^chat|chat_(?:format|kwargs|style|args)"
    r"|(?:^|(?<!^n)(?<!^num)_)prompt(?:s|ing)?$|prompt_(?:format|style|prefix|suffix|text|template)|system_prompt"
    r"|system_message|marker|(?:^|_)bos(?:_|$)|^pca|mean_subtract|subtract_mean|^cent(?:er|re)(?:ed|ing)?$|standardi[sz]e|z_?score"
    r"|^norm$|^norm_(?:kind|type|mode|method)$|unit_norm|normali[sz]ation|(?:^|_)normali[sz]ed?(?:_(?:activations?|vectors?|inputs?))?$"
    r"|^prefix$|^suffix$|(?:assistant|response|answer|generation|completion|forced|output)_(?:prefix|prompt|start)"
    r"|(?:^|_)hook|residual|^stream$|final_norm|^checkpoints$|^depth_|^layers$|layer_ind(?:ices|exes)$|^min_layer$"
    r"|fresh_block|summary_token|(?:^|_)slots$"
    # vectors
    r"|(?:^|_)zca(?:_|$)|mean_?cent(?:er|re)|demean|(?:remove|removed|minus|without)_(?:the_)?mean|mean_(?:removed|subtracted)"
    r"|(?:^|_)subtract(?:s|ed)?_|(?:^|_)l[12]_?norm(?:ed|ali[sz]ed)?$|(?:^|_)normed(?:_|$)|^(?:layer|rms)_?norm(?:ed|ali[sz]ed)?$"
    r"|^norm_(?:activations?|vectors?|inputs?)|^(?:input|vector|output)s?_norm$|^clip_(?:norm|activations?|vectors?)$"
    r"|(?:^|_)(?:activation|vector|input)s?_(?:transform|pre_?process|scal(?:e|ing)(?:_|$)|clip)|^pre_?process(?:ing|ed)?$"
    r"|^transforms?$|(?:^|_)affine(?:_|$)|^re_?scal(?:e|ed|ing)(?:_(?:by|to|factor|activations?|vectors?))?$"
    r"|^scaled(?:_by)?$|^scale_(?:by|factor|activations?|vectors?)$"
    r"|^(?:projection|projected|rotation|rotated)$"
    # where a reading is taken
    r"|^(?:activation_|read(?:ing|out)?_|extraction_|capture_)?(?:sites?|module|component|target|tap|pooling|readout|stream)$"
    r"|^(?:read(?:ing|out)?_|token_|activation_|extraction_|capture_|tap_)?(?:position|positions)$|^token_(?:index|offset)$"
    r"|^(?:position|token)_(?:strategy|selection|policy|rule)$|(?:^|_)(?:read|reading|readout|output|tap|capture)_layers?$"
    r"|^n(?:um)?_vectors$|^(?:value_)?head_(?:type|kind|bias|norm|activation|layers)$"
    # prompts
    r"|^system$|^instructions?$|^conversation(?:_(?:template|format|style))?$|^format$|(?:^|_)(?:concept|open|close|start|end)_tags?$"
    r"|^stop_(?:strings?|tokens?|sequences?|words?)$|^add_(?:special_tokens|eos)|^cot$|chain_of_thought|^mode$"
)  # fmt: skip
"""Names that say how vectors are made, how a prompt is built or where a reading is taken, whatever section they stand in: a user
is told to move what informs below `training:`, and what changes numbers must not pass there."""

OPAQUE = frozenset({
    "api_summaries", "parent_checkpoints", "parent_dataset", "parent_datasets", "role_aliases", "trained_on",
})  # fmt: skip
"""What a checkpoint was made of and by. Text and lists of text are its own words, of which none is about how it is read; the
keys of a mapping are judged (vectors whose parents are whitened are whitened)."""

INFORMATIONAL = OPAQUE | RESULTS | frozenset({
    # who, when, with what
    "author", "authors", "citation", "comment", "comments", "contact", "date", "description", "doi", "experiment", "framework",
    "checksum", "code", "device", "git_branch", "git_commit", "git_dirty", "hardware", "hf_repo", "homepage", "host", "hostname",
    "job_id", "language", "languages", "license", "md5", "repo", "repository", "sha256", "slurm_job_id", "source", "uuid",
    "wandb_id",
    "model_card", "name", "note", "notes", "paper", "provenance", "readme", "repo_id", "revision", "run", "run_id", "run_name",
    "tags", "timestamp", "title", "url", "user", "version", "versions", "wandb", "wandb_run", "wandb_run_id", "wandb_url",
    # training
    "batch_size", "duration", "epoch", "epochs", "examples", "group_size", "iteration", "iterations", "kl_coef",
    "shuffle_seed", "global_batch_size", "global_step", "hours", "hyperparameters",
    "learning_rate", "lora_alpha", "lora_r", "lora_rank", "loss_type", "lr", "minutes", "optimizer", "rollout_id", "scheduler",
    "seed", "stage", "step", "steps", "train_batch_size", "training", "training_args", "training_data", "world_size",
    # results
    "held_out", "heldout",
    # data
    "corpus", "dataset", "dataset_id", "dataset_name", "dataset_url", "datasets", "keep_debug_metadata", "row_count", "split",
    "splits",
    # the model, as its own files say it
    "architecture", "architectures", "base_commit", "base_revision", "dtype", "library_name", "model_type", "n_layers",
    "num_layers", "num_parameters", "num_params", "torch_dtype",
})  # fmt: skip
"""Names at the top of a sidecar that only inform."""

MEASURED_OF = (
    "train", "training", "eval", "evaluation", "val", "validation", "test", "dev", "held_out", "heldout", "holdout", "best",
    "final", "first", "last", "initial", "current", "mean", "median", "avg", "average", "min", "max", "total", "num", "n", "sft",
    "rl", "sl", "grpo", "ppo", "av", "ar", "actor", "critic", "nla", "text", "gold", "shuffled", "round_trip", "roundtrip",
    "raw", "policy", "global", "optimizer", "warmup", "save", "saved", "logging", "accumulation", "gradient_accumulation",
    "wall", "wall_clock", "gpu", "extraction", "rollout", "fve",
)  # fmt: skip
"""What may stand before the name of something that was measured or counted: whose it is, and when. A verb makes another name of
it (`subtract_baseline`, `refine_steps`)."""

INFORMATIONAL_PATTERN = re.compile(
    r"^(?:created|updated|modified|generated|trained|exported|written|converted|saved|published|released|uploaded|started|finished)"
    r"_(?:at|by|on|with)$|(?:^|_)(?:commit|date|timestamp)$"
    r"|^(?:torch|transformers|peft|python|cuda|numpy|vllm|sglang|code|library|package|writer|nla|ksweep)_(?:version|revision)$"
    r"|^(?:(?:" + "|".join(MEASURED_OF) + r")_)*(?:loss|fve|mse|baseline|cosine|accuracy|score|reward|perplexity|steps?|epochs?"
    r"|iterations?|time|hours|metrics)(?:_(?:nrm|pct|percent|raw|rawvar|meannorm|std|stderr|mean))*$"
    r"|^num_(?:activations|docs|documents|examples|gpus|rows|samples|tokens|vectors)$"
)
"""Families of such names: dates, commits, versions of libraries, results, counts of data."""

ABOUT_DATA = frozenset({
    "attn_implementation", "context_length", "corpus_config", "corpus_name", "corpus_revision", "corpus_slice", "corpus_split",
    "doc_count", "extractor", "max_length", "max_position", "max_tokens", "min_position", "min_tokens", "model_revision",
    "num_shards", "num_workers", "padding_side", "positions_per_doc", "script", "seq_len", "sequence_length", "shard",
    "text_column", "text_split", "tokenizer", "tokenizer_name", "tokenizer_revision", "truncation", "truncation_side",
})  # fmt: skip
"""Names in the section `extraction` that tell of the data's making; those that inform at the top do so there too."""
TEXT_OF_VECTORS = frozenset({
    "add_bos", "add_generation_prompt", "add_special_tokens", "apply_chat_template", "chat", "chat_format", "chat_kwargs",
    "chat_template", "chat_template_args", "chat_template_kwargs", "enable_thinking", "num_vectors", "n_vectors", "prepend_bos",
    "system_prompt", "use_chat_template",
})  # fmt: skip
"""Names that say of ready-made vectors which text they are of, or how many there are: they are raw vectors either way. Of an AV
or AR the same names say how its prompt is built."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 60, 30, 60
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 3


def abbreviated(value: Any) -> str:
    """Return a value as text for a message: one line of bounded length, however large or often aliased it is."""
    try:
        return " ".join(_SHORT.repr(value).split())[:200]
    except ValueError:  # a whole number of more digits than Python prints
        return f"a huge {type(value).__name__}"


class _Loader(yaml.SafeLoader):
    """YAML forbids a key to stand twice in a mapping; PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raise ConstructorError for a key that occurs twice."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {abbreviated(twice[0])} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, refuse: Refuse) -> Any:
    """Return the content of a sidecar; FileNotFoundError passes through.

    Raises:
        What `refuse` makes: unreadable, not YAML, or far larger than any sidecar.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise refuse(f"{path} has {size} bytes, expected a sidecar of a few thousand. Is it the right file?")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise refuse(f"{path} cannot be read as YAML ({reason}). Copy the sidecar again, whole.") from error


def value_at(meta: Mapping[str, Any], dotted: str) -> Any:
    """Return the value under a dotted key; None where it or a parent is absent."""
    value: Any = meta
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def says(meta: Mapping[Any, Any], key: str) -> bool:
    """Return whether a key of this name is true anywhere in the sidecar."""
    return any(value is True and _plain(name.rpartition(".")[2]) == key for name, value in _nested(meta))


def read_layer(meta: Mapping[str, Any], path: Path, refuse: Refuse) -> int | None:
    """Return the layer L, wherever the sidecar states it.

    Raises:
        What `refuse` makes: no whole number, or two places that disagree.
    """
    layers = {key: value for key in LAYER_KEYS if (value := value_at(meta, key)) is not None}
    layers |= {key: value for key, value in _nested(meta) if value is not None and _is_layer(key)}
    for key, value in layers.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise refuse(
                f"{path} has {key}={abbreviated(value)}, expected a whole number >= 0. Correct it, or use the sidecar that was "
                "released with the weights."
            )
    if len(set(layers.values())) > 1:
        raise refuse(f"{path} names different layers: {_spelled(layers)}. All mean the block that was read: make them agree.")
    return next(iter(layers.values()), None)


def _is_layer(key: str) -> bool:
    *sections, last = map(_plain, key.split("."))
    return last in LAYER_NAMES and not (last == "layer" and RESULTS.intersection(sections))


def base_model(meta: Mapping[str, Any], path: Path, refuse: Refuse, notes: list[Note]) -> str | None:
    """Return the base model's name, wherever the sidecar states it; paths, which training leaves behind, are not compared.

    A relative path may look like a hub id. One of a directory that training makes (`outputs/run3`) goes behind hub ids, with a
    note.

    Raises:
        What `refuse` makes: no text, or two hub ids that disagree.
    """
    stated = {key: value for key in BASE_KEYS if (value := value_at(meta, key)) is not None}
    for key, value in stated.items():
        if not isinstance(value, str):
            raise refuse(f"{path} has {key}={abbreviated(value)}, expected text: the base model's name. Correct it.")
    left = {key: value for key, value in stated.items() if OF_TRAINING.search(value)}
    hub = {key: value for key, value in stated.items() if key not in left and HUB_ID.match(value)}
    if hub and left:
        text = f"{path} has {_spelled(left)}, taken as a directory of its training, beside {_spelled(hub)}."
        notes.append(Note("base model", text))
    names = {key: value.partition("@")[0].lower().split("/")[1] for key, value in hub.items()}
    if len(set(names.values())) > 1:
        raise refuse(f"{path} names different base models: {_spelled(hub)}. Keep the one whose activations were read.")
    return next(iter((hub or stated).values()), None)


def _spelled(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={abbreviated(value)}" for key, value in values.items())


def check_keys(
    meta: Mapping[Any, Any], understood: frozenset[str], path: Path, refuse: Refuse, informs: frozenset[str] = frozenset()
) -> None:
    """Check that every key is understood, asks for what is done anyway, or is informational.

    Args:
        understood: dotted names of the keys that the reader takes values from; their parents are sections, of which every key
            is judged as those at the top are.
        informs: names that inform this reader, whatever their value and wherever they stand.

    Raises:
        What `refuse` makes, for the first key that is none of these: its name, its value, what to do.
    """
    _Judge(meta, understood, path, refuse, informs).judge_all()


def is_done(key: str, value: Any) -> bool:
    """Return whether a key of this name asks for what ksweep does anyway."""
    return any(_same(usual, value) for usual in ALREADY_SO.get(_plain(key), ()))


class _Judge:
    """Judges the keys of one sidecar."""

    def __init__(
        self, meta: Mapping[Any, Any], understood: frozenset[str], path: Path, refuse: Refuse, informs: frozenset[str]
    ) -> None:
        self.meta, self.understood, self.path, self.refuse, self.informs = meta, understood, path, refuse, informs
        self.sections = {name.rpartition(".")[0] for name in understood} - INFORMATIONAL
        self.judged: set[int] = set()
        self.own = {name.rpartition(".")[2]: value for name in understood if (value := value_at(meta, name)) is not None}

    def judge_all(self) -> None:
        """Judge the top-level keys and those of each section."""
        for key, value in self.meta.items():
            if str(key) not in self.sections:
                self.judge(str(key), value)
            elif isinstance(value, dict):
                self.judge_entries(str(key), value)
            elif value is not None:
                raise self.refuse(f"{self.path} has {key}={abbreviated(value)}, expected keys and values. Correct the sidecar.")

    def judge_entries(self, name: str, entries: Mapping[Any, Any]) -> None:
        if id(entries) in self.judged:  # aliases may repeat one without end
            return
        self.judged.add(id(entries))
        for key, value in entries.items():
            self.judge(f"{name}.{key}", value)

    def judge(self, name: str, value: Any) -> None:
        """Judge one key, of any type; below an informational one only what changes numbers is refused."""
        if self.is_harmless(name, value):
            return
        self.refuse_change(name, value)
        if _is_arguments(name, value):
            return
        if not _informs(name):
            raise self.refuse(
                f"{self.path} has {_shown(name)}={abbreviated(value)}, a key that is not known and could change a vector, a "
                "prompt or a reading. If it only informs, move it below `training:` or remove it from the sidecar."
            )
        for inner, held in _nested(value):
            if not self.is_harmless(f"{name}.{inner}", held):
                self.refuse_change(f"{name}.{inner}", held)

    def is_harmless(self, name: str, value: Any) -> bool:
        """Return whether a key is empty, read, a repetition of a read one, asks for what is done anyway, or informs."""
        last = name.rpartition(".")[2]
        repeats = last in self.own and _same(self.own[last], value)
        informs = _plain(last) in self.informs or _is_opaque(last, value)
        return value is None or name in self.understood or repeats or is_done(last, value) or informs

    def refuse_change(self, name: str, value: Any) -> None:
        """Refuse a key that changes numbers, or an entry that is not understood in a mapping that does."""
        if _is_arguments(name, value):
            self.judge_entries(name, value)
        elif CHANGES.search(_plain(name.rpartition(".")[2])):
            raise self.refuse(
                f"{self.path} has {_shown(name)}={abbreviated(value)}, which says how vectors, prompts or readings are made and "
                "is not understood by this version: numbers taken without it would be wrong. Use a checkpoint (or vectors) "
                "made without it."
            )


def _informs(name: str) -> bool:
    section, _, last = name.rpartition(".")
    leaf = _plain(last)
    if section:
        return section == "extraction" and (leaf in ABOUT_DATA or _informs(leaf))
    return leaf in INFORMATIONAL or INFORMATIONAL_PATTERN.search(leaf) is not None


def _is_opaque(key: str, value: Any) -> bool:
    """Return whether the value of a key is free content that contains no keys."""
    if key not in OPAQUE:
        return False
    words = value if isinstance(value, list) else [value]
    return key == "api_summaries" or all(isinstance(word, str) for word in words)


def _is_arguments(name: str, value: Any) -> bool:
    return isinstance(value, dict) and _plain(name.rpartition(".")[2]) in ARGUMENTS


def _nested(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys anywhere inside a value, visiting each object once, as aliases may repeat it without end."""
    seen: set[int] = set()
    left = [("", value)]
    while left:
        before, container = left.pop()
        if id(container) in seen or not isinstance(container, (dict, list)):
            continue
        seen.add(id(container))
        if isinstance(container, list):
            left.extend((before, held) for held in container)
            continue
        pairs = [(f"{before}{key}", held) for key, held in container.items() if not _is_opaque(key, held)]
        yield from pairs
        left.extend((f"{name}.", held) for name, held in pairs)


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal texts (ignoring case), equal numbers (true is not 1), or both empty."""
    if isinstance(a, str) and isinstance(b, str):
        return a.strip().lower() == b.strip().lower()
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return isinstance(a, bool) == isinstance(b, bool) and a == b
    return type(a) is type(b) and not a and not b


def _shown(name: str) -> str:
    return abbreviated(name)[1:-1]


def _plain(key: str) -> str:
    """Return a key in one spelling: enableThinking, enable-thinking and ENABLE_THINKING become enable_thinking."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()).strip("_")
