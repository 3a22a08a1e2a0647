"""What the decoder and the encoder of a talkative-autoencoder file consist of: options against tensor names and shapes.

The options are those of `config["trainable_components"]`; where an old file lacks one, the reference's default holds. Lengths
come from the tensors. Whatever is missing, too much or of another shape is an error that names it: the reference went on with
identity projections or plain token embeddings.
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
from ksweep.utils.text import some_of

if TYPE_CHECKING:
    import torch

JUST_INPUT = "just_input"
"""patch_all_layers: the vector is a prompt embedding and no block's input is overwritten."""
BASE = "base."
DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "decoder": {"patch_all_layers": False},
    "encoder": {"output_layer": -1, "add_current_token": False},
}
"""Options that files of an early reference lack, and that change what is computed."""
Shape = tuple[int | None, ...]
"""None: any length of at least 1."""


@dataclass(frozen=True)
class DecoderLayout:
    """How a vector gets into the prompt."""

    left: int
    """Prompt tokens before the vector; its position."""
    right: int
    """Prompt tokens after it."""
    num_patched: int
    """Blocks, from the first, whose input is overwritten at the vector's position."""
    projections: tuple[int, ...]
    """Which stored projection makes the prompt embedding, and then the input of each patched block."""
    is_stacked: bool
    """Projections lie in one tensor proj_weight [projection, d, d]; else there is a single proj.weight."""
    subtracts_position: bool
    """The embedding of the activation's position is taken off it first."""
    has_base: bool
    """The file holds the base's weights, trained further."""

    @property
    def prefix_length(self) -> int:
        """Tokens before the first sampled one."""
        return self.left + 1 + self.right


@dataclass(frozen=True)
class EncoderLayout:
    """What surrounds an explanation, and where its vector is read."""

    soft_prompt: int
    """Trained embeddings before the explanation."""
    postfix: int
    """Trained embeddings after it."""
    adds_current_token: bool
    """The token at the activation's position comes last."""
    has_special_vector: bool
    """A trained vector is added to the last embedding."""
    output_layer: int
    """Block whose output is read; -1: the last one, before the final norm; -2: the input of block 0."""
    has_projection: bool
    adds_position: bool
    """The embedding of the activation's position is added at the end."""
    has_base: bool
    """The file holds the base's weights, trained further."""
    trains_base: bool
    """All of the base was trained, a copy of its own; else, if anything, the position embeddings of a shared one."""

    @property
    def num_around(self) -> int:
        """Embeddings besides those of the explanation."""
        return self.soft_prompt + self.postfix + self.adds_current_token


def decoder_layout(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], model: Mapping[str, Any], path: Path
) -> DecoderLayout:
    """The decoder's options, checked against its tensors.

    Args:
        config, state: the file's configuration and decoder tensors. model: config.json of the base.

    Raises:
        CheckpointError: every tensor that is missing, unexpected or of another shape; options that contradict one another.
    """
    options, d = _options(config, "decoder", path), model["hidden_size"]
    num_patched = _num_patched(options, model["num_hidden_layers"], path)
    stacked, extra = _flag(options, "per_layer_projections", False, path), _flag(options, "new_decoder", False, path)
    subtracts = _flag(options, "subtract_add_pos_embeddings", False, path)
    num_projections = num_patched + extra if stacked else 1
    if num_projections == 0:
        raise CheckpointError(
            f"{path}: per_layer_projections with patch_all_layers={options.get('patch_all_layers')!r} leaves no projection to "
            "carry the vector into the decoder. The file's configuration does not belong to its tensors."
        )
    expected: dict[str, Shape] = {"prompt_ids": (None,) if config.get("decoder_prompt") or _rows(state, "prompt_ids") else (0,)}
    if stacked:
        expected |= {"proj_weight": (num_projections, d, d), "proj_bias": (num_projections, d)}
    else:
        expected |= {"proj.weight": (d, d), "proj.bias": (d,)}
    if subtracts:
        expected["activation_pos_embedder.weight"] = (None, d)
    has_base = _check_base(config, "decoder", state, model, path)
    _check_tensors("decoder", state, expected, {"prompt_left_emb": (None, d), "prompt_right_emb": (None, d)}, path)
    left, right = _prompt_sides(state, path)
    blocks = tuple(i + extra if stacked else 0 for i in range(num_patched))
    return DecoderLayout(left, right, num_patched, (0, *blocks), stacked, subtracts, has_base)


def encoder_layout(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], model: Mapping[str, Any], path: Path
) -> EncoderLayout:
    """The encoder's options, checked against its tensors; arguments and errors as for `decoder_layout`."""
    options, d, depth = _options(config, "encoder", path), model["hidden_size"], model["num_hidden_layers"]
    if not _flag(options, "use_base_model", True, path):
        raise CheckpointError(
            f"{path}: its encoder was trained without a base model (use_base_model=false), which is unknown here"
        )
    output_layer = whole_number({"output_layer": -1, **options}, "output_layer", -2, depth - 1, path, f"there are {depth} blocks")
    has_projection = _flag(options, "use_projection_layer", True, path)
    special = _flag(options, "special_last_token_vector", False, path)
    adds_position = _flag(options, "subtract_add_pos_embeddings", False, path)
    expected: dict[str, Shape] = {}
    if has_projection:
        expected |= {"proj.weight": (d, d), "proj.bias": (d,)}
    if special:
        expected["special_last_token_vector"] = (d,)
    if adds_position:
        expected["activation_pos_embedder.weight"] = (None, d)
    optional = _soft_prompts(config, options, expected, d)
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
    """Words that the encoder's soft prompt was initialised with, if the configuration says them."""
    text = config["trainable_components"]["encoder"].get("soft_prompt_init_text")
    return text if isinstance(text, str) and text else None


def section(values: Mapping[str, Any], key: str, otherwise: str) -> Mapping[str, Any]:
    """A non-empty dictionary inside another.

    Raises:
        CheckpointError: `otherwise`, and what was found instead.
    """
    value = values.get(key)
    if not isinstance(value, dict) or not value:
        found = "is missing" if key not in values else f"is {'an empty' if value == {} else 'a'} {type(value).__name__}"
        raise CheckpointError(
            f"{otherwise}: {key!r} {found}. Expected a file that the reference's training wrote, with its models and config."
        )
    return value


def whole_number(values: Mapping[str, Any], key: str, low: int, high: int | None, path: Path, why: str) -> int:
    """An option that is a whole number in low..high.

    Raises:
        CheckpointError: it is missing, something else, or out of range.
    """
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"from {low} to {high}"
        raise CheckpointError(f"{path}: {key} is {value!r}, expected a whole number {span} ({why})")
    return value


def _options(config: Mapping[str, Any], role: str, path: Path) -> Mapping[str, Any]:
    """One role's part of trainable_components: it says how vectors are patched in and what the encoder appends."""
    both = section(config, "trainable_components", f"{path}: its config does not say how decoder and encoder are built")
    return section(both, role, f"{path}: its config does not say how the {role} is built")


def _flag(options: Mapping[str, Any], key: str, default: bool, path: Path) -> bool:
    value = options.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: the option {key} is {value!r}, expected true or false")
    return bool(value)


def layout_notes(
    config: Mapping[str, Any], layouts: Mapping[str, DecoderLayout | EncoderLayout], model: Mapping[str, Any], path: Path
) -> Iterator[Note]:
    """What was taken for granted of decoder and encoder: options that the file does not say, base weights that it does not hold.

    Args:
        config, model, path: as for `decoder_layout`. layouts: "decoder" and "encoder", both checked.
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
    """true: every block; n: the first n (1 is not true); false or "just_input": none."""
    value = options.get("patch_all_layers", False)
    if isinstance(value, bool) or value is None:
        return depth if value else 0
    if value == JUST_INPUT:
        return 0
    why = f"or true, false, {JUST_INPUT!r}; the base has {depth} blocks"
    return whole_number(options, "patch_all_layers", 0, depth, path, why)


def _soft_prompts(config: Mapping[str, Any], options: Mapping[str, Any], expected: dict[str, Shape], d: int) -> dict[str, Shape]:
    """Adds the soft prompts that the options promise to `expected`; returns those that may be there.

    The text before "<text>" became the prompt, the text after it the postfix; without the mark all of it is the prompt.
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
    known = {**optional, **expected}
    shapes = [
        f"{name} {list(state[name].shape)} instead of [{', '.join('n' if n is None else str(n) for n in shape)}]"
        for name, shape in known.items()
        if name in state and not _fits(state[name], shape)
    ]
    kinds = [f"{name} ({state[name].dtype})" for name in known.keys() & state.keys() if _wrong_kind(name, state[name])]
    found = (
        ("lacks", sorted(expected.keys() - state.keys())),
        ("has unexpected", sorted(name for name in state.keys() - known.keys() if not name.startswith(BASE))),
        ("has in another shape", shapes),
        ("has as another type", kinds),
    )
    if problems := [f"{what} {some_of(names)}" for what, names in found if names]:
        raise CheckpointError(
            f"the {role} in {path} does not fit its configuration: it {'; it '.join(problems)}. Without the right tensors it "
            "would compute something else than was trained: get the whole file, or check that autoencoder.base is its base."
        )


def _fits(tensor: torch.Tensor, shape: Shape) -> bool:
    if tensor.ndim != len(shape):
        return False
    return all(have >= 1 if want is None else have == want for have, want in zip(tensor.shape, shape, strict=True))


def _wrong_kind(name: str, tensor: torch.Tensor) -> bool:
    """Ids are whole numbers, everything else is floating point and dense."""
    return tensor.is_floating_point() == (name == "prompt_ids") or tensor.is_sparse or tensor.is_complex()


def _prompt_sides(state: Mapping[str, torch.Tensor], path: Path) -> tuple[int, int]:
    """Lengths left and right of the vector; together with it they are as many as prompt_ids, which is empty without a prompt."""
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
    """Whether the file holds base weights; they must be there if training changed them from the first step."""
    has_base = any(name.startswith(BASE) for name in state)
    if has_base or not _base_was_trained(config, role, model, path):
        return has_base
    if is_scheduled(config):  # `check_unfreezing` judges whether it was written before they were unfrozen; `layout_notes` says so
        return False
    raise CheckpointError(
        f"the {role} in {path} was trained together with its base model, but the file holds no {BASE}* tensors. The untrained "
        "base would give other numbers: get the whole file."
    )


def check_unfreezing(
    config: Mapping[str, Any],
    layouts: Mapping[str, DecoderLayout | EncoderLayout],
    model: Mapping[str, Any],
    written: Written,
    path: Path,
) -> None:
    """A half without base weights, whose base training unfreezes, was written before that.

    Args:
        layouts: "decoder" and "encoder".
        written: when the file was written.

    Raises:
        CheckpointError: the other half holds its base, or the schedule had unfrozen it.
    """
    for role, other in (("decoder", "encoder"), ("encoder", "decoder")):
        if layouts[role].has_base or not _base_was_trained(config, role, model, path):
            continue
        if layouts[other].has_base:
            evidence = f"the {other}, which shared one base with it, holds them, so that the base had been unfrozen"
        elif was_unfrozen(config, role, written):
            evidence = (
                f"it was written at step {written.step} (epoch {written.epoch}), after its schedule had unfrozen the base "
                f"(at {' and '.join(unfreezing(config, role))})"
            )
        else:
            continue
        raise CheckpointError(
            f"the {role} in {path} was trained together with its base model, but the file holds no {BASE}* tensors of it: "
            f"{evidence}. The untrained base would give other numbers: get the whole file."
        )


def _base_was_trained(config: Mapping[str, Any], role: str, model: Mapping[str, Any], path: Path) -> bool:
    """The base as a whole, or its token embeddings or GPT-2's position embeddings alone (also then every weight is stored).

    Decoder and encoder share one base object, whose embeddings the encoder, built last, has the last word on.
    """
    options = {name: _options(config, name, path) for name in ("decoder", "encoder")}
    scheduled = was_enabled(config, role, "base_model")
    if _flag(options[role], "base_model", role == "encoder", path) if scheduled is None else scheduled:
        return True

    def trains(key: str, encoder_default: bool) -> bool:
        asked = {name: _flag(options[name], key, encoder_default and name == "encoder", path) for name in options}
        return asked["encoder"] and (role == "encoder" or asked["decoder"])

    positions = trains("pos_embeddings", encoder_default=True) and model.get("model_type") == "gpt2"
    return positions or trains("embedding_head", encoder_default=False)


def _rows(state: Mapping[str, torch.Tensor], name: str) -> int:
    return len(state[name]) if name in state else 0


def base_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base weights in a file, under the names of the model they belong to; buffers that old versions stored left out."""
    return {
        name.removeprefix(BASE): tensor
        for name, tensor in state.items()
        if name.startswith(BASE) and not re.search(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$", name)
    }
