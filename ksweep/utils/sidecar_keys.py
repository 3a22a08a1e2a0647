"""Decide which keys of a sidecar are accepted: those that are read, ask for the default behaviour, or only inform.

Sidecars are written by others. An ignored key could state how vectors were made, how a prompt is built or where a reconstruction
is read, and the numbers would be wrong without a warning. So a key is accepted only if it

    is null,
    is read (`understood`, given by the reader),
    asks for what is done anyway (`ALREADY_SO`, e.g. `norm: none`), or
    informs (`INFORMATIONAL`, `INFORMATIONAL_PATTERN`, `informs` of the reader); inside such a section only `CHANGES` are refused.
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
from ksweep.utils.plain_values import MOST_DIGITS, MOST_LEVELS

Refuse = Callable[[str], Exception]
"""Turns a message into the error to raise."""

LARGEST = 1_000_000
"""Largest size of a sidecar in bytes; public ones have 2,000 to 4,000."""

MOST_MERGED, MOST_MERGED_KEYS = 16, 1000
"""Mappings that merge keys (<<) may put into one mapping, and keys that it may have then."""

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
"""Dotted keys under which a sidecar states the layer L."""
LAYER_NAMES = frozenset({"extraction_layer_index", "extraction_layer", "layer_index", "layer_idx", "layer"})
"""Key names that state L in any section, except `layer` below `RESULTS`: results may be of any layer."""
OF_WHITENING = "extraction.whitening.layer_index"
"""Layer of the vectors that a whitening was made from (syvb/EasyNLA)."""
RESULTS = frozenset({"baseline", "eval", "evaluation", "fve", "loss", "losses", "metrics", "results", "scores"})
"""Sections and keys of measured results."""
BASE_KEYS = ("base_checkpoint", "base_model", "extraction.base_model")
OF_TRAINING = re.compile(
    r"^(?:\w+[_-])?(?:outputs?|out|checkpoints?|ckpts?|runs?|models|results|exps?|experiments?|logs?|saves?|saved|tmp|work"
    r"|workspace|scratch|weights|artifacts|train|training)/[\w.-]+$"
    r"|/(?:(?:global_)?step|iter|epoch|ckpt|checkpoint|run)[-_]?\d+$",
    re.IGNORECASE,
)
"""Relative paths of training runs that look like hub ids."""

RAW = (False, "", "none", "null", "raw", "no", "off")
"""Values of `norm` and `whitening` for vectors as block L outputs them."""
RESIDUAL = ("resid_post", "hook_resid_post", "residual", "residual_stream", "block_output")
"""Names for the output of a block."""
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
"""Values that ask for the default behaviour, by key name in any section: raw vectors, one marker whose embedding row is replaced
by the vector at norm injection_scale, the chat template's default rendering, an AR that is read before the final norm.
`enable_thinking` is compared with the rendered prompt once there is a tokenizer."""

ARGUMENTS = ("chat_template_kwargs", "chat_template_args", "chat_kwargs", "chat", "injection", "prompting")
"""Mappings whose every entry must be understood."""

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
"""Key names that state how vectors are made, how a prompt is built or where a reconstruction is read, in any section. Messages
advise moving informational keys below `training:`; a key that changes numbers must be refused there as well."""

OPAQUE = frozenset({
    "api_summaries", "parent_checkpoints", "parent_dataset", "parent_datasets", "role_aliases", "trained_on",
})  # fmt: skip
"""What a checkpoint was made from, and who wrote it. Values that are text or lists of text are never checked; the keys of a
mapping are, because vectors whose parents are whitened are whitened."""

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
"""Top-level key names that only inform."""

MEASURED_OF = (
    "train", "training", "eval", "evaluation", "val", "validation", "test", "dev", "held_out", "heldout", "holdout", "best",
    "final", "first", "last", "initial", "current", "mean", "median", "avg", "average", "min", "max", "total", "num", "n", "sft",
    "rl", "sl", "grpo", "ppo", "av", "ar", "actor", "critic", "nla", "text", "gold", "shuffled", "round_trip", "roundtrip",
    "raw", "policy", "global", "optimizer", "warmup", "save", "saved", "logging", "accumulation", "gradient_accumulation",
    "wall", "wall_clock", "gpu", "extraction", "rollout", "fve",
)  # fmt: skip
"""Prefixes allowed before the name of a measurement or count; they name its subject or its time. Verbs are not among them: they
change the meaning (`subtract_baseline`, `refine_steps`)."""

INFORMATIONAL_PATTERN = re.compile(
    r"^(?:created|updated|modified|generated|trained|exported|written|converted|saved|published|released|uploaded|started|finished)"
    r"_(?:at|by|on|with)$|(?:^|_)(?:commit|date|timestamp)$"
    r"|^(?:torch|transformers|peft|python|cuda|numpy|vllm|sglang|code|library|package|writer|nla|ksweep)_(?:version|revision)$"
    r"|^(?:(?:" + "|".join(MEASURED_OF) + r")_)*(?:loss|fve|mse|baseline|cosine|accuracy|score|reward|perplexity|steps?|epochs?"
    r"|iterations?|time|hours|metrics)(?:_(?:nrm|pct|percent|raw|rawvar|meannorm|std|stderr|mean))*$"
    r"|^num_(?:activations|docs|documents|examples|gpus|rows|samples|tokens|vectors)$"
)
"""Patterns of such names: dates, commits, library versions, results, counts of data."""

ABOUT_DATA = frozenset({
    "attn_implementation", "context_length", "corpus_config", "corpus_name", "corpus_revision", "corpus_slice", "corpus_split",
    "doc_count", "extractor", "max_length", "max_position", "max_tokens", "min_position", "min_tokens", "model_revision",
    "num_shards", "num_workers", "padding_side", "positions_per_doc", "script", "seq_len", "sequence_length", "shard",
    "text_column", "text_split", "tokenizer", "tokenizer_name", "tokenizer_revision", "truncation", "truncation_side",
})  # fmt: skip
"""Names in the section `extraction` that describe how the data was made; names that inform at the top level inform here too."""
TEXT_OF_VECTORS = frozenset({
    "add_bos", "add_generation_prompt", "add_special_tokens", "apply_chat_template", "chat", "chat_format", "chat_kwargs",
    "chat_template", "chat_template_args", "chat_template_kwargs", "enable_thinking", "num_vectors", "n_vectors", "prepend_bos",
    "system_prompt", "use_chat_template",
})  # fmt: skip
"""Key names that state which text ready-made vectors come from, or how many there are; the vectors are raw either way. In the
sidecar of an AV or AR the same names state how its prompt is built."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 60, 30, 60
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 3


def abbreviated(value: Any) -> str:
    """Return a value as one line of bounded length for a message, whatever its size or number of aliases."""
    try:
        return " ".join(_SHORT.repr(value).split())[:200]
    except ValueError:  # a whole number of more digits than Python prints
        return f"a huge {type(value).__name__}"


class ShallowLoader(yaml.SafeLoader):
    """PyYAML's safe loader for documents of at most MOST_LEVELS levels: deeper ones took seconds until the stack was full."""

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node. Raises ComposerError below too many others."""
        self._level += 1
        if self._level > MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {MOST_LEVELS} levels deep", None)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._level -= 1
        return node


class _Loader(ShallowLoader):
    """A loader that refuses duplicate keys, as YAML does; PyYAML takes the last one."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return a scalar. Raises ConstructorError for a number to the base of 60 ("1:30") of any length."""
        value = super().construct_scalar(node)
        if node.tag.endswith((":int", ":float")) and ":" in value and len(value) > MOST_DIGITS:
            problem = f"a number to the base of 60 has {len(value):,} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Copy what merge keys (<<) stand for. Raises ConstructorError if they stand for more than a sidecar needs."""
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        num_sources = sum(len(value.value) if isinstance(value, yaml.SequenceNode) else 1 for value in merged)
        if num_sources <= MOST_MERGED:
            super().flatten_mapping(node)
        if num_sources > MOST_MERGED or (merged and len(node.value) > MOST_MERGED_KEYS):
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) stand for too many keys", node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping. Raises ConstructorError for a duplicate key."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if duplicates := [key for key, count in keys.items() if count > 1]:
            problem = f"the key {abbreviated(duplicates[0])} occurs twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, refuse: Refuse) -> Any:
    """Return the content of a sidecar.

    Raises:
        FileNotFoundError: there is no such file.
        The error of `refuse`: the file is unreadable, not YAML, or far larger than any sidecar.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise refuse(f"{path} has {size} bytes, expected a sidecar of a few thousand. Check that it is the right file.")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise
    except (
        OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, yaml.YAMLError,
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise refuse(f"{path} cannot be read as YAML ({reason}). Copy the whole sidecar again.") from error


def value_at(meta: Mapping[str, Any], dotted: str) -> Any:
    """Return the value under a dotted key; None where the key or a parent is absent."""
    value: Any = meta
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def requests(meta: Mapping[Any, Any], key: str) -> bool:
    """Return whether a key of this name is true in any section."""
    return any(value is True and _plain(name.rpartition(".")[2]) == key for name, value in _nested(meta))


def read_layer(meta: Mapping[str, Any], path: Path, refuse: Refuse) -> int | None:
    """Return the layer L from any key that states it; None if no key does.

    Raises:
        The error of `refuse`: a value is no whole number, or two keys disagree.
    """
    layers = {key: value for key in LAYER_KEYS if (value := value_at(meta, key)) is not None}
    layers |= {key: value for key, value in _nested(meta) if value is not None and _is_layer(key)}
    if layers.get(OF_WHITENING) == -1:  # its writer's word for none
        del layers[OF_WHITENING]
    for key, value in layers.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise refuse(
                f"{path} has {key}={abbreviated(value)}, expected a whole number >= 0. Correct it, or use the sidecar that was "
                "released with the weights."
            )
    if len(set(layers.values())) > 1:
        raise refuse(f"{path} names different layers: {_spelled(layers)}. All mean the block that was read. Make them equal.")
    return next(iter(layers.values()), None)


def _is_layer(key: str) -> bool:
    *sections, last = map(_plain, key.split("."))
    return last in LAYER_NAMES and not (last == "layer" and RESULTS.intersection(sections))


def base_model(meta: Mapping[str, Any], path: Path, refuse: Refuse, notes: list[Note]) -> str | None:
    """Return the base model's name from any key that states it; None if no key does.

    Hub ids are preferred, and compared with each other. Paths, which training leaves behind, are not compared. A relative path of
    a training directory (`outputs/run3`) looks like a hub id; beside a real one it is set aside, with a note.

    Raises:
        The error of `refuse`: a value is no text, or two hub ids disagree.
    """
    names = {key: value for key in BASE_KEYS if (value := value_at(meta, key)) is not None}
    for key, value in names.items():
        if not isinstance(value, str):
            raise refuse(f"{path} has {key}={abbreviated(value)}, expected text: the base model's name. Correct it.")
    training_paths = {key: value for key, value in names.items() if OF_TRAINING.search(value)}
    hub_ids = {key: value for key, value in names.items() if key not in training_paths and HUB_ID.match(value)}
    if hub_ids and training_paths:
        text = f"{path} has {_spelled(training_paths)}, taken as a directory of its training, beside {_spelled(hub_ids)}."
        notes.append(Note("base model", text))
    if len({value.partition("@")[0].lower().split("/")[1] for value in hub_ids.values()}) > 1:
        raise refuse(f"{path} names different base models: {_spelled(hub_ids)}. Keep the one whose activations were read.")
    return next(iter((hub_ids or names).values()), None)


def _spelled(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={abbreviated(value)}" for key, value in entries.items())


def check_keys(
    meta: Mapping[Any, Any], understood: frozenset[str], path: Path, refuse: Refuse, informs: frozenset[str] = frozenset()
) -> None:
    """Check that every key is understood, asks for the default behaviour, or informs.

    Args:
        understood: dotted names of the keys that the reader takes values from. Their parents are sections, whose keys are checked
            like those at the top level.
        informs: names that only inform this reader, in any section and with any value.

    Raises:
        The error of `refuse` for the first key that is none of these, with its name, its value and what to do.
    """
    _KeyCheck(meta, understood, path, refuse, informs).check_all()


def is_done(key: str, value: Any) -> bool:
    """Return whether a key of this name and value asks for the default behaviour."""
    return any(_same(default, value) for default in ALREADY_SO.get(_plain(key), ()))


class _KeyCheck:
    """The check of one sidecar's keys."""

    def __init__(
        self, meta: Mapping[Any, Any], understood: frozenset[str], path: Path, refuse: Refuse, informs: frozenset[str]
    ) -> None:
        self.meta, self.understood, self.path, self.refuse, self.informs = meta, understood, path, refuse, informs
        self.sections = {name.rpartition(".")[0] for name in understood} - INFORMATIONAL
        self.checked: set[int] = set()
        self.own = {name.rpartition(".")[2]: value for name in understood if (value := value_at(meta, name)) is not None}

    def check_all(self) -> None:
        """Check the keys at the top level and those of each section."""
        for key, value in self.meta.items():
            if str(key) not in self.sections:
                self.check(str(key), value)
            elif isinstance(value, dict):
                self.check_entries(str(key), value)
            elif value is not None:
                raise self.refuse(f"{self.path} has {key}={abbreviated(value)}, expected keys and values. Correct the sidecar.")

    def check_entries(self, name: str, entries: Mapping[Any, Any]) -> None:
        """Check the entries of the mapping `name`."""
        if id(entries) in self.checked:  # aliases can make a mapping contain itself
            return
        self.checked.add(id(entries))
        for key, value in entries.items():
            self.check(f"{name}.{key}", value)

    def check(self, name: str, value: Any) -> None:
        """Refuse a key that changes numbers or is unknown; below an informational key only those that change numbers."""
        # 1. Accept keys that are read, repeat a value that is read, or ask for the default behaviour.
        if self.is_harmless(name, value):
            return
        # 2. Refuse keys that change numbers. The entries of argument mappings are checked one by one.
        self.refuse_change(name, value)
        if _is_arguments(name, value):
            return
        # 3. Refuse unknown keys.
        if not _informs(name):
            raise self.refuse(
                f"{self.path} has {_shown(name)}={abbreviated(value)}, a key that is not known and could change a vector, a "
                "prompt or where the AR is read. If it only informs, move it below `training:` or remove it from the sidecar."
            )
        # 4. Inside an informational key, refuse what changes numbers.
        for inner_name, inner_value in _nested(value):
            if not self.is_harmless(f"{name}.{inner_name}", inner_value):
                self.refuse_change(f"{name}.{inner_name}", inner_value)

    def is_harmless(self, name: str, value: Any) -> bool:
        """Return whether a key is null, is read, repeats a value that is read, asks for a default, or informs this reader."""
        last = name.rpartition(".")[2]
        repeats = last in self.own and _same(self.own[last], value)
        informs = _plain(last) in self.informs or _is_opaque(last, value)
        return value is None or name in self.understood or repeats or is_done(last, value) or informs

    def refuse_change(self, name: str, value: Any) -> None:
        """Refuse a key that changes numbers, and each such entry of an argument mapping."""
        if _is_arguments(name, value):
            self.check_entries(name, value)
        elif CHANGES.search(_plain(name.rpartition(".")[2])):
            raise self.refuse(
                f"{self.path} has {_shown(name)}={abbreviated(value)}, which says how vectors or prompts are made or where the "
                "AR is read. This version does not support it, and numbers taken without it would be wrong. Use a checkpoint (or "
                "vectors) made without it."
            )


def _informs(name: str) -> bool:
    """Return whether a dotted key only informs, at the top level or in the section `extraction`."""
    section, _, last = name.rpartition(".")
    leaf = _plain(last)
    if section:
        return section == "extraction" and (leaf in ABOUT_DATA or _informs(leaf))
    return leaf in INFORMATIONAL or INFORMATIONAL_PATTERN.search(leaf) is not None


def _is_opaque(key: str, value: Any) -> bool:
    """Return whether a key's value is free text, without keys to check."""
    if key not in OPAQUE:
        return False
    words = value if isinstance(value, list) else [value]
    return key == "api_summaries" or all(isinstance(word, str) for word in words)


def _is_arguments(name: str, value: Any) -> bool:
    return isinstance(value, dict) and _plain(name.rpartition(".")[2]) in ARGUMENTS


def _nested(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each dotted key inside a value with its value; each container once, since aliases can make one contain itself."""
    visited: set[int] = set()
    pending = [("", value)]
    while pending:
        prefix, container = pending.pop()
        if id(container) in visited or not isinstance(container, (dict, list)):
            continue
        visited.add(id(container))
        if isinstance(container, list):
            pending.extend((prefix, entry) for entry in container)
            continue
        pairs = [(f"{prefix}{key}", entry) for key, entry in container.items() if not _is_opaque(key, entry)]
        yield from pairs
        pending.extend((f"{name}.", entry) for name, entry in pairs)


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal texts (ignoring case), equal numbers (true is not 1), or empty values of one type."""
    if isinstance(a, str) and isinstance(b, str):
        return a.strip().lower() == b.strip().lower()
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return isinstance(a, bool) == isinstance(b, bool) and a == b
    return type(a) is type(b) and not a and not b


def _shown(name: str) -> str:
    return abbreviated(name)[1:-1]


def _plain(key: str) -> str:
    """Return a key in snake case: enableThinking, enable-thinking and ENABLE_THINKING become enable_thinking."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()).strip("_")
