"""Derive the layout of a talkative-autoencoder file's decoder and encoder from its options, tensor names and shapes.

The options are those of `config["trainable_components"]`; an option that an old file lacks has the reference's default. Lengths
come from the tensors. Missing, unexpected and misshapen tensors are errors that name them: the reference continued with identity
projections or plain token embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.tae.schedule import Written, is_scheduled, unfreezing, was_enabled, was_unfrozen
from ksweep.utils.errors import CheckpointError
from ksweep.utils.notes import Note
from ksweep.utils.sidecar_keys import abbreviated
from ksweep.utils.text import some_of

if TYPE_CHECKING:
    import torch

JUST_INPUT = "just_input"
"""Value of patch_all_layers with which the vector is only a prompt embedding, and no block's input is overwritten."""
BASE = "base."
DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "decoder": {"patch_all_layers": False},
    "encoder": {"output_layer": -1, "add_current_token": False},
}
"""Defaults of options that change the computation and that files of an early reference version lack."""
LARGEST_OPTION = (1 << 31) - 1
Shape = tuple[int | None, ...]
"""Expected shape of a tensor; None is any length of at least 1."""


@dataclass(frozen=True)
class DecoderLayout:
    """How the decoder takes its vector."""

    left: int
    """Number of prompt tokens before the vector, and so its position."""
    right: int
    """Number of prompt tokens after it."""
    num_patched: int
    """Number of blocks, from the first, whose input is overwritten at the vector's position."""
    projections: tuple[int, ...]
    """Indices of the stored projections: first that of the prompt embedding, then those of the patched blocks."""
    is_stacked: bool
    """Whether projections are stored in one tensor proj_weight [projection, d, d] instead of a single proj.weight."""
    subtracts_position: bool
    """Whether the embedding of the activation's position is subtracted from it first."""
    has_base: bool
    """Whether the file holds trained weights of the base."""

    @property
    def prefix_length(self) -> int:
        """Number of tokens before the first sampled one."""
        return self.left + 1 + self.right


@dataclass(frozen=True)
class EncoderLayout:
    """What surrounds an explanation in the encoder, and where its vector is read."""

    soft_prompt: int
    """Number of trained embeddings before the explanation."""
    postfix: int
    """Number of trained embeddings after it."""
    adds_current_token: bool
    """Whether the token at the activation's position comes last."""
    has_special_vector: bool
    """Whether a trained vector is added to the last embedding."""
    output_layer: int
    """Block whose output is read; -1 is the last block, before the final norm, and -2 the input of block 0."""
    has_projection: bool
    adds_position: bool
    """Whether the embedding of the activation's position is added at the end."""
    has_base: bool
    """Whether the file holds trained weights of the base."""
    trains_base: bool
    """Whether the encoder trained a whole base of its own; otherwise at most the position embeddings of a shared one."""

    @property
    def num_around(self) -> int:
        """Number of embeddings besides those of the explanation."""
        return self.soft_prompt + self.postfix + self.adds_current_token


def decoder_layout(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], model: Mapping[str, Any], path: Path
) -> DecoderLayout:
    """Return the decoder's layout, once its options fit its tensors.

    Args:
        config, state: configuration and decoder tensors of the file.
        model: config.json of the base.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape, or options contradict each other.
    """
    # 1. Read the options.
    options, d = _options(config, "decoder", path), model["hidden_size"]
    num_patched = _num_patched(options, model["num_hidden_layers"], path)
    stacked, extra = _flag(options, "per_layer_projections", False, path), _flag(options, "new_decoder", False, path)
    subtracts = _flag(options, "subtract_add_pos_embeddings", False, path)
    num_projections = num_patched + extra if stacked else 1
    if num_projections == 0:
        raise CheckpointError(
            f"{path}: per_layer_projections with patch_all_layers={abbreviated(options.get('patch_all_layers'))} leaves no "
            "projection of the vector into the decoder. The file's configuration does not belong to its tensors."
        )
    # 2. List the tensors that they imply.
    expected: dict[str, Shape] = {"prompt_ids": (None,) if config.get("decoder_prompt") or _rows(state, "prompt_ids") else (0,)}
    if stacked:
        expected |= {"proj_weight": (num_projections, d, d), "proj_bias": (num_projections, d)}
    else:
        expected |= {"proj.weight": (d, d), "proj.bias": (d,)}
    if subtracts:
        expected["activation_pos_embedder.weight"] = (None, d)
    # 3. Compare them with the file's.
    has_base = _check_base(config, "decoder", state, model, path)
    _check_tensors("decoder", state, expected, {"prompt_left_emb": (None, d), "prompt_right_emb": (None, d)}, path)
    left, right = _prompt_sides(state, path)
    blocks = tuple(i + extra if stacked else 0 for i in range(num_patched))
    return DecoderLayout(left, right, num_patched, (0, *blocks), stacked, subtracts, has_base)


def encoder_layout(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], model: Mapping[str, Any], path: Path
) -> EncoderLayout:
    """Return the encoder's layout, once its options fit its tensors; arguments and errors as for `decoder_layout`."""
    # 1. Read the options.
    options, d, depth = _options(config, "encoder", path), model["hidden_size"], model["num_hidden_layers"]
    if not _flag(options, "use_base_model", True, path):
        raise CheckpointError(
            f"{path}: its encoder was trained without a base model (use_base_model=false), which is not supported"
        )
    output_layer = whole_number({"output_layer": -1, **options}, "output_layer", -2, depth - 1, path, f"there are {depth} blocks")
    has_projection = _flag(options, "use_projection_layer", True, path)
    special = _flag(options, "special_last_token_vector", False, path)
    adds_position = _flag(options, "subtract_add_pos_embeddings", False, path)
    # 2. List the tensors that they imply.
    expected: dict[str, Shape] = {}
    if has_projection:
        expected |= {"proj.weight": (d, d), "proj.bias": (d,)}
    if special:
        expected["special_last_token_vector"] = (d,)
    if adds_position:
        expected["activation_pos_embedder.weight"] = (None, d)
    optional = _soft_prompts(config, options, expected, d)
    # 3. Compare them with the file's.
    has_base = _check_base(config, "encoder", state, model, path)
    _check_tensors("encoder", state, expected, optional, path)
    return EncoderLayout(
        soft_prompt=_rows(state, "soft_prompt_embeddings"),
        postfix=_rows(state, "soft_prompt_embeddings_postfix"),
        adds_current_token=_flag(options, "add_current_token", False, path),
        has_special_vector=special,
        output_layer=output_layer,
        has_projection=has_projection,
        adds_position=adds_position,
        has_base=has_base,
        trains_base=_flag(options, "base_model", True, path),
    )


def soft_prompt_text(config: Mapping[str, Any]) -> str | None:
    """Return the words that the encoder's soft prompt was initialised with; None if the configuration does not state them."""
    text = config["trainable_components"]["encoder"].get("soft_prompt_init_text")
    return text if isinstance(text, str) and text else None


def section(values: Mapping[str, Any], key: str, otherwise: str) -> Mapping[str, Any]:
    """Return a non-empty dictionary inside another.

    Raises:
        CheckpointError: there is none; the message begins with `otherwise`.
    """
    value = values.get(key)
    if not isinstance(value, dict) or not value:
        problem = "is missing" if key not in values else f"is {'an empty' if value == {} else 'a'} {type(value).__name__}"
        raise CheckpointError(
            f"{otherwise}: {key!r} {problem}. Expected a file that the reference's training wrote, with its models and config."
        )
    return value


def whole_number(values: Mapping[str, Any], key: str, low: int, high: int | None, path: Path, why: str) -> int:
    """Return an option that must be a whole number from `low` to `high`.

    Raises:
        CheckpointError: it is missing, of another type, or out of range; the message ends with `why`.
    """
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or value > (LARGEST_OPTION if high is None else high):
        span = f">= {low}" if high is None else f"from {low} to {high}"
        raise CheckpointError(f"{path}: {key} is {abbreviated(value)}, expected a whole number {span} ({why})")
    return value


def _options(config: Mapping[str, Any], role: str, path: Path) -> Mapping[str, Any]:
    """Return one role's part of trainable_components, the options of its layout."""
    both = section(config, "trainable_components", f"{path}: its config does not say how decoder and encoder are built")
    return section(both, role, f"{path}: its config does not say how the {role} is built")


def _flag(options: Mapping[str, Any], key: str, default: bool, path: Path) -> bool:
    value = options.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: the option {key} is {abbreviated(value)}, expected true or false")
    return bool(value)


def layout_notes(
    config: Mapping[str, Any], layouts: Mapping[str, DecoderLayout | EncoderLayout], model: Mapping[str, Any], path: Path
) -> Iterator[Note]:
    """Yield notes on assumptions: defaults for options that the file lacks, and base weights that it does not hold.

    Args:
        config, model, path: as for `decoder_layout`.
        layouts: checked layouts of "decoder" and "encoder".
    """
    for role, defaults in DEFAULTS.items():
        options = _options(config, role, path)
        for key, default in defaults.items():
            if key not in options:
                yield Note(
                    "checkpoint",
                    f"The config of {path} does not say {role}.{key}: taken as {default!r}, the default of the reference system.",
                )
    for role, layout in layouts.items():
        if not layout.has_base and _base_was_trained(config, role, model, path):
            yield Note(
                "checkpoint",
                f"{path} holds no base weights of the {role}, which its config says were trained: taken as written before they "
                "were unfrozen.",
            )


def _num_patched(options: Mapping[str, Any], depth: int, path: Path) -> int:
    """Return the number of patched blocks: all for true, n for n (1 is not true), none for false or "just_input"."""
    value = options.get("patch_all_layers", False)
    if isinstance(value, bool) or value is None:
        return depth if value else 0
    if value == JUST_INPUT:
        return 0
    why = f"or true, false, {JUST_INPUT!r}; the base has {depth} blocks"
    return whole_number(options, "patch_all_layers", 0, depth, path, why)


def _soft_prompts(config: Mapping[str, Any], options: Mapping[str, Any], expected: dict[str, Shape], d: int) -> dict[str, Shape]:
    """Add the soft prompts that the options imply to `expected`, and return those that are optional.

    The text before "<text>" became the prompt and the text after it the postfix; without "<text>" the whole text is the prompt.
    """
    text = options.get("soft_prompt_init_text")
    if text is None and not options.get("soft_prompt_length"):
        text = config.get("encoder_prompt")
    if isinstance(text, str) and text:
        expected["soft_prompt_embeddings"] = (None, d)
        if text.partition("<text>")[2]:
            expected["soft_prompt_embeddings_postfix"] = (None, d)
        return {}
    if options.get("soft_prompt_length"):
        expected["soft_prompt_embeddings"] = (None, d)
        return {}
    return {"soft_prompt_embeddings": (None, d), "soft_prompt_embeddings_postfix": (None, d)}


def _check_tensors(
    role: str, state: Mapping[str, torch.Tensor], expected: Mapping[str, Shape], optional: Mapping[str, Shape], path: Path
) -> None:
    """Check names, shapes and types of a half's tensors.

    Raises:
        CheckpointError: with every tensor that is missing, unexpected, or of another shape or type.
    """
    allowed = {**optional, **expected}
    shapes = [
        f"{name} {list(state[name].shape)} instead of [{', '.join('n' if n is None else str(n) for n in shape)}]"
        for name, shape in allowed.items()
        if name in state and not _fits(state[name], shape)
    ]
    kinds = [f"{name} ({state[name].dtype})" for name in allowed.keys() & state.keys() if _is_wrong_type(name, state[name])]
    faults = (
        ("lacks", sorted(expected.keys() - state.keys())),
        ("has unexpected", sorted(name for name in state.keys() - allowed.keys() if not name.startswith(BASE))),
        ("has in another shape", shapes),
        ("has as another type", kinds),
    )
    if problems := [f"{fault} {some_of(names)}" for fault, names in faults if names]:
        raise CheckpointError(
            f"the {role} in {path} does not fit its configuration: it {'; it '.join(problems)}. With these tensors it would "
            "not compute what was trained. Get the complete file, or check that autoencoder.base is its base."
        )


def _fits(tensor: torch.Tensor, shape: Shape) -> bool:
    if tensor.ndim != len(shape):
        return False
    return all(size >= 1 if expected is None else size == expected for size, expected in zip(tensor.shape, shape, strict=True))


def _is_wrong_type(name: str, tensor: torch.Tensor) -> bool:
    """Return whether ids are not whole numbers, or another tensor is not dense floating point."""
    return tensor.is_floating_point() == (name == "prompt_ids") or tensor.is_sparse or tensor.is_complex()


def _prompt_sides(state: Mapping[str, torch.Tensor], path: Path) -> tuple[int, int]:
    """Return the numbers of prompt tokens before and after the vector, once they fit prompt_ids, which may be empty."""
    left, right = _rows(state, "prompt_left_emb"), _rows(state, "prompt_right_emb")
    ids = _rows(state, "prompt_ids")
    if left + 1 + right != (ids or 1):
        raise CheckpointError(
            f"{path}: prompt_ids counts {ids} tokens, but prompt_left_emb has {left or 'no'} rows and prompt_right_emb "
            f"{right or 'no'} rows; expected {ids} = left + 1 for the vector + right. A side of the prompt is missing or cut."
        )
    return left, right


def _check_base(
    config: Mapping[str, Any], role: str, state: Mapping[str, torch.Tensor], model: Mapping[str, Any], path: Path
) -> bool:
    """Return whether the file holds base weights, which it must if training changed them from the first step."""
    has_base = any(name.startswith(BASE) for name in state)
    if has_base or not _base_was_trained(config, role, model, path):
        return has_base
    if is_scheduled(
        config
    ):  # `check_unfreezing` checks that the file was written before they were unfrozen, and `layout_notes` notes it
        return False
    raise CheckpointError(
        f"the {role} in {path} was trained together with its base model, but the file holds no {BASE}* tensors. The untrained "
        "base would give other numbers. Get the complete file."
    )


def check_unfreezing(
    config: Mapping[str, Any],
    layouts: Mapping[str, DecoderLayout | EncoderLayout],
    model: Mapping[str, Any],
    written: Written,
    path: Path,
) -> None:
    """Check that a half without base weights was written before training unfroze its base.

    Args:
        layouts: layouts of "decoder" and "encoder".
        written: when the file was written.

    Raises:
        CheckpointError: the other half holds base weights, or the schedule had unfrozen them.
    """
    for role, other in (("decoder", "encoder"), ("encoder", "decoder")):
        if layouts[role].has_base or not _base_was_trained(config, role, model, path):
            continue
        if layouts[other].has_base:
            evidence = f"the {other}, which shared one base with it, holds them, so the base had been unfrozen"
        elif was_unfrozen(config, role, written):
            evidence = (
                f"it was written at step {written.step} (epoch {written.epoch}), after its schedule had unfrozen the base "
                f"(at {' and '.join(unfreezing(config, role))})"
            )
        else:
            continue
        raise CheckpointError(
            f"the {role} in {path} was trained together with its base model, but the file holds no {BASE}* tensors of it: "
            f"{evidence}. The untrained base would give other numbers. Get the complete file."
        )


def _base_was_trained(config: Mapping[str, Any], role: str, model: Mapping[str, Any], path: Path) -> bool:
    """Return whether training changed a half's base: all of it, its token embeddings, or GPT-2's position embeddings.

    A file stores every base weight in each of these cases. Decoder and encoder share one base object; the encoder is built last,
    so its options decide on the embeddings.
    """
    options = {name: _options(config, name, path) for name in ("decoder", "encoder")}
    scheduled = was_enabled(config, role, "base_model")
    if _flag(options[role], "base_model", role == "encoder", path) if scheduled is None else scheduled:
        return True

    def trains(key: str, encoder_default: bool) -> bool:
        flags = {name: _flag(options[name], key, encoder_default and name == "encoder", path) for name in options}
        return flags["encoder"] and (role == "encoder" or flags["decoder"])

    positions = trains("pos_embeddings", encoder_default=True) and model.get("model_type") == "gpt2"
    return positions or trains("embedding_head", encoder_default=False)


def _rows(state: Mapping[str, torch.Tensor], name: str) -> int:
    return len(state[name]) if name in state else 0


def base_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the base weights in a file under the model's own names, without the buffers that old versions stored."""
    return {
        name.removeprefix(BASE): tensor
        for name, tensor in state.items()
        if name.startswith(BASE) and not re.search(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$", name)
    }
