"""Fill prompting records by layout: what a checkpoint's sidecar says, what its trainer did without saying, what the spec
overrides.

Sources: kitft/natural_language_autoencoders; asherps/EasyNLA at 4d72847 (injection.py, schema.py, utils/critic.py); anicka-net/
nla-at-home at cc84bc1 (scripts/train_av.py, train_ar.py, train_universal_av.py). docs/layouts.md has the three side by side.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ksweep.autoencoder.nla.sidecar import OPEN_TAG, Sidecar
from ksweep.autoencoder.nla.weight_files import WeightFiles
from ksweep.autoencoder.prompting import (
    DEPTH_FIELD,
    MARKER_FIELD,
    AddAfterBlock,
    ArPrompting,
    AvPrompting,
    Injection,
    ReplaceEmbedding,
)
from ksweep.config.spec import LayoutName, PromptingOverrides
from ksweep.utils.errors import CheckpointError

EASYNLA_BLOCK = 1
"""EasyNLA adds the vector to the output of the second block."""
LONGEST_AT_HOME = 512
"""Tokens after which nla-at-home cuts the prompt of an AR that is read at a marker, and with it the marker."""
OF_TRAINERS: dict[LayoutName, AvPrompting] = {
    "kitft": AvPrompting(injection=ReplaceEmbedding(1), template="", marker=""),
    "easynla": AvPrompting(
        injection=AddAfterBlock(EASYNLA_BLOCK), template="", marker="", empty_counts=True, skips_special_tokens=True
    ),
    "nla-at-home": AvPrompting(
        injection=ReplaceEmbedding(1), template="", marker="", must_close=False, skips_special_tokens=True
    ),
}
"""What each trainer did that no sidecar states."""


def at_layer(sidecar: Sidecar, layer: int | None, path: Path) -> Sidecar:
    """Return the sidecar of a pair for all layers at the layer that the spec states; any other unchanged.

    Raises:
        CheckpointError: the layer is missing, contradicts the sidecar, or lies below those of the training.
    """
    if layer is None and sidecar.is_universal and sidecar.layer is None:
        raise CheckpointError(f"{path} was trained for all layers: set autoencoder.layer to the one that it is to be used at.")
    if None not in (layer, sidecar.layer) and layer != sidecar.layer:
        raise CheckpointError(f"autoencoder.layer={layer}, but {path} is of layer {sidecar.layer}. Leave it out.")
    used = sidecar.layer if layer is None else layer
    if used is not None and used < sidecar.min_layer:
        where = "its sidecar states" if layer is None else "autoencoder.layer is"
        raise CheckpointError(f"{path} was trained for layers from {sidecar.min_layer} on, and {where} {used}. Use one of those.")
    return sidecar if layer is None or not sidecar.is_universal else replace(sidecar, layer=layer)


def depth_of_model(sidecar: Sidecar, num_blocks: int, is_cut: bool, lent: int | None, path: Path) -> int:
    """Return the number of blocks of the whole model, of which a half for all layers is told its layer's share.

    Args:
        num_blocks: blocks of the half's own model, or of its base.
        is_cut: whether those are the first blocks alone, as in an AR of full weights.
        lent: blocks of the AV beside an AR; None if unknown.

    Raises:
        CheckpointError: n_layers is not that number, or is missing in a cut AR that has no AV beside it.
    """
    stated, template = sidecar.model_depth, sidecar.ar_template if sidecar.role == "ar" else sidecar.av_template
    whole = lent if is_cut else num_blocks
    if stated is not None and (stated < num_blocks or whole not in (None, stated)):
        raise CheckpointError(
            f"{path} says n_layers={stated}, but its model has {num_blocks if whole is None else whole} blocks. Sidecar and "
            "model are of different checkpoints, or the base is another model."
        )
    if is_cut and sidecar.is_universal and (stated or lent) is None and DEPTH_FIELD in (template or ""):
        raise CheckpointError(
            f"AR {path} is told the depth of its layer in percent of the model, and holds its first {num_blocks} blocks alone. "
            "Add n_layers, the number of blocks of the whole model, to its sidecar."
        )
    return stated or whole or num_blocks


def av_prompting(sidecar: Sidecar, overrides: PromptingOverrides, num_blocks: int) -> AvPrompting:
    """Return the prompting of an AV whose sidecar has passed its checks.

    Raises:
        CheckpointError: the AV has no block of the number after which the vector is to be added, or the closing tag is one of
            several stop tokens.
    """
    assert sidecar.av_template is not None and sidecar.marker is not None
    prompting = replace(
        OF_TRAINERS[sidecar.layout], injection=_injection(sidecar, overrides, num_blocks),
        template=_at_depth(sidecar.av_template, sidecar, num_blocks), marker=sidecar.marker, marker_id=sidecar.marker_id,
        left_id=sidecar.left_id, right_id=sidecar.right_id, asks_for_thinking=sidecar.asks_for_thinking, is_chat=sidecar.is_chat,
        prompt_ids=sidecar.prompt_ids, prompt_text=sidecar.prompt_text,
    )  # fmt: skip
    if sidecar.layout == "nla-at-home" and OPEN_TAG.search(sidecar.av_template):
        prompting = replace(prompting, opening_tag="", empty_counts=True)
    names = ("chat_arguments", "prefill", "opening_tag", "closing_tag", "stop_tokens")
    stated = {name: value for name in names if (value := getattr(overrides, name)) is not None}
    if "chat_arguments" in stated or overrides.av_template or overrides.marker:
        stated["prompt_ids"] = stated["prompt_text"] = None
    if "closing_tag" in stated:
        stated["must_close"] = True
    prompting = replace(prompting, **stated)
    stops = prompting.stop_tokens or ()
    if prompting.closing_tag in stops and len(stops) > 1:
        raise CheckpointError(
            f"autoencoder.prompting.stop_tokens={list(stops)} holds the closing tag beside others, so an answer that another "
            "token ended would be indistinguishable from a closed one. Name the closing tag alone, or leave it out."
        )
    return prompting


def _injection(sidecar: Sidecar, overrides: PromptingOverrides, num_blocks: int) -> Injection:
    """Return where the vector enters: as the spec says, else as the layout does."""
    block = overrides.injection_block
    if overrides.injection is None and sidecar.layout == "easynla":
        block = EASYNLA_BLOCK
    if block is None:
        if sidecar.injection_scale is None:
            raise CheckpointError(
                "autoencoder.prompting.injection=replace_embedding needs the norm of the row, and the checkpoint states none: "
                "set autoencoder.prompting.injection_scale"
            )
        return ReplaceEmbedding(sidecar.injection_scale, sidecar.multiplies)
    if overrides.injection_scale is not None:
        raise CheckpointError(
            f"autoencoder.prompting.injection_scale={overrides.injection_scale:g}, but the vector is added to the output of "
            f"block {block}, scaled to its norm, as EasyNLA does. Leave it out, or set "
            "autoencoder.prompting.injection=replace_embedding."
        )
    if block >= num_blocks:
        raise CheckpointError(
            f"autoencoder.prompting.injection_block={block}, but the AV has {num_blocks} blocks (0 to {num_blocks - 1}). Name "
            "the block after which the vector was added in training."
        )
    return AddAfterBlock(block)


def _at_depth(template: str, sidecar: Sidecar, num_blocks: int) -> str:
    """Return the template with the depth that the half is told."""
    return template if sidecar.layer is None else template.replace(DEPTH_FIELD, str(told_depth(sidecar, num_blocks)))


def told_depth(sidecar: Sidecar, num_blocks: int) -> int:
    """Return the listed percentage that is nearest to the depth of the layer in a model of so many blocks, the first of two."""
    assert sidecar.layer is not None
    depth = 100 * sidecar.layer / num_blocks
    return min(sidecar.depths, key=lambda percentage: abs(percentage - depth))


def ar_prompting(sidecar: Sidecar, overrides: PromptingOverrides, weights: WeightFiles, num_blocks: int) -> ArPrompting:
    """Return the prompting of an AR whose sidecar has passed its checks.

    Args:
        weights: an AR of nla-at-home without a head is read at its marker.
        num_blocks: blocks of the whole base.
    """
    assert sidecar.ar_template is not None
    prompting = ArPrompting(template=_at_depth(sidecar.ar_template, sidecar, num_blocks), suffix_ids=sidecar.suffix_ids)
    if sidecar.layout == "easynla":
        prompting = replace(prompting, special_tokens=False, normalises=True)
    if sidecar.layout == "nla-at-home":
        template = prompting.template.replace(MARKER_FIELD, sidecar.marker or MARKER_FIELD)
        prompting = replace(prompting, template=template, doubled_braces=False)
        if weights.head is None:
            prompting = replace(
                prompting, special_tokens=False, marker=sidecar.marker, marker_id=sidecar.marker_id, longest=LONGEST_AT_HOME
            )
    if overrides.ar_template is not None:
        prompting = replace(prompting, doubled_braces=True)
    if overrides.ar_special_tokens is not None:
        prompting = replace(prompting, special_tokens=overrides.ar_special_tokens)
    return prompting if overrides.ar_readout is None else replace(prompting, readout=overrides.ar_readout, marker=None)
