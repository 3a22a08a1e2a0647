"""Which files hold the weights of an AV or AR: a whole model, adapters over a base, the AR's head. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.autoencoder.nla.sidecar import AR_LORA, CONFIG_NAME, HEADS, NlaRole, Sidecar, beside_or_above
from ksweep.utils import files, hub
from ksweep.utils.errors import CheckpointError
from ksweep.utils.lora_config import check_lora_config, named_base
from ksweep.utils.notes import Note
from ksweep.utils.safetensors_header import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ksweep.utils.sidecar_keys import abbreviated, check_keys
from ksweep.utils.tensor_headers import read_header
from ksweep.utils.text import some_of

HEAD = "value_head.safetensors"
ADAPTER_KIND, MODEL_KIND = f"an adapter ({ADAPTER_CONFIG})", "a whole model (model.safetensors)"
TUNED_KIND = f"a tuned model (model.safetensors or {ADAPTER_CONFIG})"
FILES_OF_METHODS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lora_sl": ((ADAPTER_KIND,), (HEAD, MODEL_KIND)),
    "value_head+frozen": ((HEAD,), (HEADS, ADAPTER_KIND)),
    "value_head+finetune": ((HEAD, TUNED_KIND), (HEADS,)),
    "per_layer_value_heads+frozen_backbone": ((HEADS,), (HEAD, MODEL_KIND)),
}
"""What an AR of nla-at-home has by its training.method, and what it does not have.

A published AR for all layers (phi4-universal-ar-v2) has heads beside an adapter.
"""
FROZEN_BESIDE_MODEL = (
    "says that its head was trained over a frozen base (value_head+frozen), and holds a whole model, which is the one used."
)
AR_META = "ar_meta.json"
AR_META_KEYS = frozenset({
    "ar_num_layers", "lora_r", "lora_alpha", "quant", "target_modules", "final_norm_stripped", "ar_fresh_block",
    "summary_token_id", "n_slots",
})  # fmt: skip
HEAD_DTYPES = ("F32", "BF16", "F16", "F64")
HEAD_KEY = "value_head.weight"
LAYER_MEANS = "layer_means.pt"
"""Beside an AR of nla-at-home that gives vectors less the mean of their layer."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA that is merged into a base."""

    directory: Path
    file: Path
    """Its weights; `directory` has PEFT's adapter_config.json unless `lora` stands for it."""
    lora: Mapping[str, Any] | None = None
    """Arguments of peft's LoraConfig, for a file that holds the LoRA without PEFT's configuration."""

    @property
    def is_peft(self) -> bool:
        """Whether it was saved by PEFT."""
        return self.lora is None

    def configuration(self) -> Mapping[str, Any]:
        """Return what rank, scale and targets are stated by."""
        return files.read_json(self.directory / ADAPTER_CONFIG, "adapter configuration") if self.lora is None else self.lora

    @property
    def config_name(self) -> str:
        """Name of the file that states rank, scale and targets."""
        return ADAPTER_CONFIG if self.is_peft else AR_META


@dataclass(frozen=True)
class Head:
    """The tensor of an AR's d x d map."""

    file: Path
    key: str


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights of an AV or AR are."""

    base: str | None
    """Path or hub id of the model under adapters or a head; None where the checkpoint's own directory holds a whole model."""
    adapters: tuple[Adapter, ...] = ()
    """Adapters in the order in which they are merged into the base."""
    head: Head | None = None
    """None for an AV, and for an AR that is read without a head."""
    keeps_final_norm: bool = False
    """Whether the final norm of the base is applied to the output of block L before the head."""
    num_layers: int | None = None
    """Blocks of an AR by its own files; None where they do not say."""
    notes: tuple[Note, ...] = ()
    base_is_merged: bool = False
    """Whether `base` holds other adapters already, so that it is not the base of the pair's other half."""


def find_weights(
    path: Path,
    sidecar: Sidecar,
    role: NlaRole,
    base: str | None,
    stack: Sequence[str],
    layer: int | None,
    lent: str | None = None,
) -> WeightFiles:
    """Return where the weights of a checkpoint are, once its files are of one kind.

    Args:
        base: the base model that the spec states.
        stack: what the spec puts between the base and an AV's adapter (`Autoencoder.av_stack`).
        layer: L, which chooses the head of an AR for all layers.
        lent: base of the AV, for an AR of EasyNLA.

    Raises:
        CheckpointError: two kinds of weights lie in one directory, or what a kind needs is missing.
    """
    if role == "av":
        return _av_weights(path, base, stack)
    if sidecar.layout == "nla-at-home":
        _check_files_of_method(path, sidecar.method)
    if (path / AR_LORA).exists() and sidecar.layout != "easynla":
        raise CheckpointError(f"{path} holds {AR_LORA}, which EasyNLA alone writes: leave autoencoder.layout out.")
    if (path / AR_LORA).exists():
        return _easynla_lora(path, sidecar, base, lent)
    if (path / HEADS).exists():
        return _all_heads(path, base, layer)
    if (path / ADAPTER_CONFIG).exists():
        is_read_at_marker = sidecar.layout == "nla-at-home" and not (path / HEAD).exists()
        head = None if is_read_at_marker else Head(path / HEAD, "weight")
        return WeightFiles(base or _named_base(path), (_peft(path),), head)
    if sidecar.layout == "nla-at-home" and (path / HEAD).exists() and not _holds_model(path):
        if base is None:
            raise CheckpointError(
                f"{path} holds a head alone ({HEAD}), to be used over the first L + 1 blocks of a base model that none of its "
                "files names. Set autoencoder.base to the base model's path or hub id."
            )
        return WeightFiles(base, head=Head(path / HEAD, "weight"))
    if (path / HEAD).exists() and not _holds_model(path) and not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} holds a head alone ({HEAD}), and no model that it belongs to. If it is an AR of nla-at-home, set "
            "autoencoder.layout=nla-at-home and autoencoder.base; else download the AR's weights."
        )
    notes = (Note("checkpoint", f"{path} {FROZEN_BESIDE_MODEL}"),) if sidecar.method == "value_head+frozen" else ()
    return WeightFiles(None, head=Head(path / HEAD, "weight"), num_layers=_meta_layers(path, sidecar), notes=notes)


def _check_files_of_method(path: Path, method: str | None) -> None:
    """Raise CheckpointError where the files of an AR of nla-at-home are not those that its training method leaves."""
    needed, foreign = FILES_OF_METHODS.get(method or "", ((), ()))
    is_there = {name: (path / name).exists() for name in (HEAD, HEADS)}
    is_there |= {ADAPTER_KIND: (path / ADAPTER_CONFIG).exists(), MODEL_KIND: _holds_model(path)}
    is_there |= {TUNED_KIND: is_there[ADAPTER_KIND] or is_there[MODEL_KIND]}
    faults = [f"lacks {kind}" for kind in needed if not is_there[kind]]
    faults += [f"also holds {kind}" for kind in foreign if is_there[kind]]
    is_bin = not is_there[MODEL_KIND] and next(path.glob("pytorch_model*.bin"), None) is not None
    if not (faults or is_bin):
        return
    faults += ["holds a model as .bin, which would not be read"] if is_bin else []
    leaves = f", which leaves {' and '.join(needed)}" if needed else ""
    raise CheckpointError(
        f"AR {path} has training.method={method!r}{leaves}, but it {' and '.join(faults)}: it would be read in another way than "
        "it was trained. "
        f"{'Save its weights as safetensors.' if is_bin else 'Download it again, without files of other ARs.'}"
    )


def _av_weights(path: Path, base: str | None, stack: Sequence[str]) -> WeightFiles:
    """Return an AV's own model, or the base and the adapters of its stack."""
    if not (path / ADAPTER_CONFIG).exists():
        if stack:
            raise CheckpointError(
                f"autoencoder.av_stack={list(stack)} lies under an adapter, and {path} holds none ({ADAPTER_CONFIG}). Leave it "
                "out, or give the adapter's directory as autoencoder.av."
            )
        return WeightFiles(None)
    directories = [hub.resolve(source, "adapter of autoencoder.av_stack") for source in stack]
    if directories and not (directories[0] / ADAPTER_CONFIG).exists():  # merged weights take the place of the base
        return WeightFiles(str(directories[0]), tuple(map(_peft, (*directories[1:], path))), base_is_merged=True)
    return WeightFiles(base or _named_base((*directories, path)[0]), tuple(map(_peft, (*directories, path))))


def _peft(directory: Path) -> Adapter:
    if not (directory / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{directory} holds no adapter ({ADAPTER_CONFIG}); in autoencoder.av_stack only the first entry may be a whole "
            "model, which takes the place of the base."
        )
    if _holds_model(directory):
        raise CheckpointError(
            f"{directory} holds both full weights and {ADAPTER_CONFIG}, so it is not clear which to load. Keep only one of "
            "them in the directory."
        )
    adapter = Adapter(directory, directory / ADAPTER_WEIGHTS)
    check_lora_config(adapter.configuration(), directory / ADAPTER_CONFIG)
    return adapter


def _named_base(directory: Path) -> str:
    where = directory / ADAPTER_CONFIG
    source = named_base(files.read_json(where, "adapter configuration"), where)
    if source is None:
        raise CheckpointError(
            f"{directory} is an adapter, and its {ADAPTER_CONFIG} names no base model. Set autoencoder.base to the base model's "
            "path or hub id."
        )
    return source


def _easynla_lora(path: Path, sidecar: Sidecar, base: str | None, lent: str | None) -> WeightFiles:
    """Return EasyNLA's LoRA and head over a base; rank and targets are in ar_meta.json or in the run's nla_config.json.

    The scale is alpha / sqrt(r), which is not recorded (scripts/train_sft.py of asherps/EasyNLA at 4d72847).
    """
    meta, where = _lora_meta(path)
    _check_meta(meta, where)
    if _holds_model(path) or (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{path} holds {AR_LORA} beside other weights, so it is not clear which to load. Keep one of them.")
    num_layers, rank, alpha = (_whole(meta, key, where) for key in ("ar_num_layers", "lora_r", "lora_alpha"))
    _check_config_of_lora(path, meta, where)
    targets = meta.get("target_modules")
    if not (isinstance(targets, str) or (isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets))):
        raise CheckpointError(
            f"{where} has target_modules={abbreviated(targets)}, expected a list of names or a pattern. Use the file "
            "that was saved with the adapter."
        )
    source = base or _base_of_lora(path, sidecar, lent)
    lora = {"r": rank, "lora_alpha": alpha, "use_rslora": True, "target_modules": targets, "lora_dropout": 0.0, "bias": "none"}
    return WeightFiles(
        source, (Adapter(path, path / AR_LORA, lora),), Head(path / AR_LORA, HEAD_KEY),
        keeps_final_norm=meta.get("final_norm_stripped") is not True, num_layers=num_layers, notes=_quant_notes(meta, where),
    )  # fmt: skip


def _base_of_lora(path: Path, sidecar: Sidecar, lent: str | None) -> str:
    """Return the base that the sidecar of an EasyNLA AR names; the AV's, if that is named so, or the other cannot be had."""
    stated = sidecar.base_checkpoint
    if stated is None and lent is None:
        raise CheckpointError(f"{path} is a LoRA over a base model that its sidecar does not name. Set autoencoder.base.")
    if stated is None or lent is None:
        return stated or lent or ""
    if not Path(stated).expanduser().exists() and hub.is_named_after(stated, Path(lent)):
        return lent
    try:
        hub.resolve(stated, "base model")
    except CheckpointError:
        return lent
    return stated


def _lora_meta(path: Path) -> tuple[Mapping[str, Any], Path]:
    """Return what is stated of a LoRA, and the file that states it."""
    if (path / AR_META).exists():
        return files.read_json(path / AR_META, "AR configuration"), path / AR_META
    file = beside_or_above(path, CONFIG_NAME)
    config = {} if file is None else files.read_json(file, "run configuration")
    if file is None or "ar_lora_r" not in config:
        raise CheckpointError(
            f"{path} has {AR_LORA}, but neither {AR_META} nor a {CONFIG_NAME} with ar_lora_r, so rank and targets of the LoRA "
            "are unknown. Copy the file that was saved beside it."
        )
    # gereon's trainer, the one writer of this file, strips the final norm and uses alpha 16.
    meta = {
        "ar_num_layers": config.get("ar_num_layers"), "lora_r": config["ar_lora_r"], "lora_alpha": 16,
        "target_modules": config.get("lora_targets"), "final_norm_stripped": True,
    }  # fmt: skip
    return meta, file


def _check_config_of_lora(path: Path, meta: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError where the run's nla_config.json states another rank or other targets than ar_meta.json."""
    file = beside_or_above(path, CONFIG_NAME)
    config = {} if file is None or file == where else files.read_json(file, "run configuration")
    for key, name in (("ar_lora_r", "lora_r"), ("lora_targets", "target_modules")):
        a, b = config.get(key), meta.get(name)
        if isinstance(a, list) and isinstance(b, list):
            a, b = sorted(map(str, a)), sorted(map(str, b))
        comparable = a is not None and (isinstance(a, list) == isinstance(b, list))  # a pattern and a list may say the same
        if comparable and a != b:
            raise CheckpointError(
                f"{file} has {key}={abbreviated(config[key])}, {where} has {name}={abbreviated(meta.get(name))}. Keep the one "
                "that the AR was trained with."
            )


def _quant_notes(meta: Mapping[str, Any], where: Path) -> tuple[Note, ...]:
    quant = meta.get("quant")
    if quant in (None, "none"):
        return ()
    text = f"{where} says quant={abbreviated(quant)}: the AR was trained over a quantised base, and is used over the stated one."
    return (Note("checkpoint", text),)


def _check_meta(meta: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError for ARs of other trainers that use the same files for another computation, and for unknown keys."""
    for key in ("ar_fresh_block", "summary_token_id", "n_slots"):
        value = meta.get(key)
        if value is None or value is False or (key == "n_slots" and value == 1):
            continue
        raise CheckpointError(
            f"{where} has {key}={abbreviated(value)}: an AR with an extra block, a summary token or several heads is not "
            "supported. Use an AR without it."
        )
    if not isinstance(meta.get("final_norm_stripped", False), bool):
        raise CheckpointError(
            f"{where} has final_norm_stripped={abbreviated(meta['final_norm_stripped'])}, expected true or false."
        )
    check_keys(
        {key: value for key, value in meta.items() if key != "use_rslora" or value is not True},
        AR_META_KEYS,
        where,
        CheckpointError,
    )


def _meta_layers(path: Path, sidecar: Sidecar) -> int | None:
    """Return the number of blocks that the ar_meta.json of a merged AR states; None without the file."""
    if sidecar.layout != "easynla" or not (path / AR_META).exists():
        return None
    meta = files.read_json(path / AR_META, "AR configuration")
    _check_meta(meta, path / AR_META)
    return None if meta.get("ar_num_layers") is None else _whole(meta, "ar_num_layers", path / AR_META)


def _whole(meta: Mapping[str, Any], key: str, where: Path) -> int:
    value = meta.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise CheckpointError(
            f"{where} has {key}={abbreviated(value)}, expected a whole number >= 1. Use the file that was saved with the adapter."
        )
    return value


def _all_heads(path: Path, base: str | None, layer: int | None) -> WeightFiles:
    """Return the head of layer L among those of an AR for all layers, over its base or an adapter beside it."""
    if _holds_model(path):
        raise CheckpointError(
            f"{path} holds {HEADS} beside {MODEL_KIND}, so it is not clear what the heads lie over. Keep the heads alone, and "
            "set autoencoder.base to the model."
        )
    heads = read_header(path / HEADS)
    names = {name for name in (f"value_head.{layer}.weight", f"value_head.{layer}", f"{layer}") if name in heads}
    if len(names) != 1:
        raise CheckpointError(
            f"{path / HEADS} has no head of layer {layer}; it holds {some_of(sorted(heads))}. Set autoencoder.layer to one of "
            "them."
        )
    adapters = (_peft(path),) if (path / ADAPTER_CONFIG).exists() else ()
    source = base or (_named_base(path) if adapters else None)
    if source is None:
        raise CheckpointError(f"{path} holds heads over a base model that none of its files names. Set autoencoder.base.")
    return WeightFiles(source, adapters, Head(path / HEADS, names.pop()))


def _holds_model(directory: Path) -> bool:
    """Return whether a directory holds weights of a whole model, in one file or several."""
    return (directory / "model.safetensors.index.json").exists() or next(directory.glob("model*.safetensors"), None) is not None


def check_head(head: Head, d_model: int) -> None:
    """Check name, type and shape of an AR's head by its file's header.

    Raises:
        CheckpointError: it is missing, or of another shape.
    """
    path, name = head.file.parent, head.file.name
    if not head.file.exists():
        raise CheckpointError(
            f"{path} has no {name}, the d x d map at the end of an AR. Download it again, and check that no AV or base model was "
            "given as `ar`."
        )
    tensors = read_header(head.file)
    if head.key not in tensors or (head.key == "weight" and set(tensors) != {"weight"}):
        raise CheckpointError(
            f"{head.file} holds the tensors {some_of(tensors) or '(none)'}; expected exactly one, named {head.key} (no bias). "
            f"Save the head as {{'{head.key}': W}}, or download it again."
        )
    tensor = tensors[head.key]
    if tensor.shape != (d_model, d_model) or tensor.dtype not in HEAD_DTYPES:
        raise CheckpointError(
            f"{head.file}: {head.key} is {tensor.dtype} of shape {list(tensor.shape)}; expected floating point of shape "
            f"[{d_model}, {d_model}]. The head is saved incompletely, or is of another model."
        )
