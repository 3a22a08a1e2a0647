"""Fill prompting records by layout: what a sidecar of the public NLA layout says, and the overrides of the spec."""

from __future__ import annotations

from dataclasses import replace

from ksweep.autoencoder.nla.sidecar import Sidecar
from ksweep.autoencoder.prompting import AddAfterBlock, ArPrompting, AvPrompting, ReplaceEmbedding
from ksweep.config.spec import PromptingOverrides
from ksweep.utils.errors import CheckpointError


def av_prompting(sidecar: Sidecar, overrides: PromptingOverrides, num_blocks: int) -> AvPrompting:
    """Return the prompting of an AV whose sidecar has passed its checks.

    Raises:
        CheckpointError: the AV has no block of the number after which the vector is to be added, or the closing tag is one of
            several stop tokens.
    """
    assert sidecar.av_template is not None and sidecar.marker is not None and sidecar.injection_scale is not None
    injection: ReplaceEmbedding | AddAfterBlock = ReplaceEmbedding(sidecar.injection_scale)
    if overrides.injection_block is not None:
        if overrides.injection_block >= num_blocks:
            raise CheckpointError(
                f"autoencoder.prompting.injection_block={overrides.injection_block}, but the AV has {num_blocks} blocks (0 to "
                f"{num_blocks - 1}). Name the block after which the vector was added in training."
            )
        injection = AddAfterBlock(overrides.injection_block)
    prompting = AvPrompting(
        injection=injection, template=sidecar.av_template, marker=sidecar.marker, marker_id=sidecar.marker_id,
        left_id=sidecar.left_id, right_id=sidecar.right_id, asks_for_thinking=sidecar.asks_for_thinking,
    )  # fmt: skip
    names = ("chat_arguments", "prefill", "opening_tag", "closing_tag", "stop_tokens")
    prompting = replace(prompting, **{name: value for name in names if (value := getattr(overrides, name)) is not None})
    stops = prompting.stop_tokens or ()
    if prompting.closing_tag in stops and len(stops) > 1:
        raise CheckpointError(
            f"autoencoder.prompting.stop_tokens={list(stops)} holds the closing tag beside others, so an answer that another "
            "token ended would be indistinguishable from a closed one. Name the closing tag alone, or leave it out."
        )
    return prompting


def ar_prompting(sidecar: Sidecar, overrides: PromptingOverrides) -> ArPrompting:
    """Return the prompting of an AR whose sidecar has passed its checks."""
    assert sidecar.ar_template is not None
    prompting = ArPrompting(template=sidecar.ar_template, suffix_ids=sidecar.suffix_ids)
    if overrides.ar_special_tokens is not None:
        prompting = replace(prompting, special_tokens=overrides.ar_special_tokens)
    return prompting if overrides.ar_readout is None else replace(prompting, readout=overrides.ar_readout)
