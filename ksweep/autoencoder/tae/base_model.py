"""Load and check the base model of a talkative autoencoder's decoder or encoder, and replace its weights by trained ones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from ksweep.inference.device_map import streaming_options
from ksweep.inference.model_parts import keep_head_input_contiguous
from ksweep.inference.transformers_models import (
    LIBRARY_ERRORS,
    blocks_of,
    cut_blocks,
    is_sane,
    load_or_lay_out,
    placed,
    quiet,
    read_model_config,
    read_tokenizer,
)
from ksweep.utils.errors import CheckpointError
from ksweep.utils.safetensors_header import BLOCK_TENSOR, NOT_TEXT, model_tensors, text_names
from ksweep.utils.text import some_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float

STARTS_AT_ZERO = re.compile(r"bias$|^special_last_token_vector$|^prompt_ids$")


def load_decoder_model(
    directory: Path, stored: Mapping[str, torch.Tensor], dtype: torch.dtype, devices: Sequence[torch.device], path: Path
) -> Any:
    """Load the decoder's model, frozen: the base, with its weights replaced by those that the checkpoint stores for the decoder.

    Final logit soft-capping is off, as it was in training (Gemma-2); soft-capping of attention is that of the base.
    """
    model = _load(AutoModelForCausalLM, directory, None, dtype, devices)
    replace_weights(model, stored, path, "decoder")
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        model.config.final_logit_softcapping = None
    model.generation_config = transformers.GenerationConfig()
    keep_head_input_contiguous(model)
    return placed(model, devices, f"the model over {directory}")


def load_encoder_model(
    directory: Path,
    num_blocks: int,
    stored: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    path: Path,
) -> tuple[Any, Float[torch.Tensor, "token d_model"]]:
    """Load the encoder's frozen model (embeddings and first blocks, no head), and return it with the base's token embeddings.

    These are the model's own unless the checkpoint stores base weights for the encoder.
    """
    model = _load(AutoModel, directory, num_blocks, dtype, devices)
    table = model.get_input_embeddings().weight
    base_table = table.detach().clone() if stored else table
    replace_weights(model, stored, path, "encoder")
    return placed(model, devices, f"the model over {directory}"), base_table.detach().to(devices[0])


def embedding_scale(model: Any) -> Float[torch.Tensor, ""]:
    """Return the factor that the embedding module multiplies its table by (Gemma: sqrt(d) in the model's dtype; others: 1).

    Embeddings that are given to the model instead of tokens must be multiplied by it.

    Raises:
        CheckpointError: the module does not just multiply its table.
    """
    embedding = model.get_input_embeddings()
    scale = torch.as_tensor(getattr(embedding, "embed_scale", 1.0), device=embedding.weight.device).to(embedding.weight.dtype)
    ids = torch.arange(min(4, embedding.num_embeddings), device=embedding.weight.device)
    with torch.inference_mode():
        matches = torch.allclose(embedding(ids), embedding.weight[ids] * scale)
    if not matches:
        raise CheckpointError(
            f"{type(embedding).__name__} does not just scale its table, so prompts of embeddings cannot be made for it. Use a "
            "checkpoint over GPT-2, Gemma-2, Gemma-3, Qwen2 or Llama."
        )
    return scale


def exact_embedding_scale(model: Any) -> float:
    """Return the factor of the reference's encoder; for Gemma-3 it is not rounded to the dtype (73.32, not 73.5, for d 5376)."""
    config = model.config.get_text_config()
    return math.sqrt(config.hidden_size) if config.model_type.startswith("gemma3") else float(embedding_scale(model))


def replace_weights(model: Any, stored: Mapping[str, torch.Tensor], path: Path, role: str) -> None:
    """Replace all weights of the model by those stored in the checkpoint; a checkpoint without base weights changes nothing.

    Stored weights of omitted blocks, and of a head or final norm that the model does not have, are ignored.

    Raises:
        CheckpointError: weights are missing, unexpected or of another shape; the message names them.
    """
    if not stored:
        return
    # 1. Compare names and shapes.
    given = _own_names(model, stored)
    own = dict(model.named_parameters())
    depth = len(blocks_of(model))
    headless = not hasattr(model, "lm_head")
    missing = own.keys() - given.keys()
    extra = {name for name in given.keys() - own.keys() if not _unused(name, depth, headless) and not _tied(name, model)}
    shapes = {
        f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    }
    faults = (("lack", missing), ("have unexpected", extra), ("have in another shape", shapes))
    if problems := [f"{fault} {some_of(names)}" for fault, names in faults if names]:
        raise CheckpointError(
            f"the base weights that the {role} in {path} was trained with {'; they '.join(problems)}. They do not belong to the "
            "base model that they should replace. Check autoencoder.base, or get the complete file."
        )
    # 2. Copy them.
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])


def check_contents(tensors: Mapping[str, torch.Tensor], role: str, path: Path) -> None:
    """Check that tensors are finite, plausibly large and not all zero; biases and the special vector may be zero, as they start.

    Raises:
        CheckpointError: tensors fail the check; the message names them.
    """
    broken = [name for name, tensor in tensors.items() if not is_sane(tensor)]
    zero = [name for name, tensor in tensors.items() if not STARTS_AT_ZERO.search(name) and not _is_nonzero(tensor)]
    for names, fault in ((broken, "NaN, infinite or absurdly large values"), (zero, "nothing but zeros")):
        if names:
            raise CheckpointError(
                f"the {role} in {path} holds {fault} in {some_of(names)}: the training run broke down, or the file is damaged. "
                "Use another checkpoint of the run."
            )


def is_identity(weight: Float[torch.Tensor, "*stack d d"]) -> bool:
    """Return whether a projection, or each of a stack, is the identity that training starts from."""
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return all(torch.equal(matrix, eye) for matrix in weight.reshape(-1, *eye.shape))


def _is_nonzero(tensor: torch.Tensor) -> bool:
    """Return whether a tensor, or each matrix of a stack, has a value other than zero."""
    return bool(tensor.detach().flatten(1).any(dim=1).all() if tensor.ndim == 3 else tensor.detach().any())


def check_base_on_meta(directory: Path) -> None:
    """Check that a base model can be loaded, on the meta device: by its headers alone, before a job is submitted.

    Raises:
        CheckpointError: as loading would.
    """
    _load(AutoModelForCausalLM, directory, None, torch.float32)


def _load(
    auto: Any, directory: Path, num_blocks: int | None, dtype: torch.dtype, devices: Sequence[torch.device] | None = None
) -> Any:
    """Load a base model with transformers, cut to its first blocks; without `devices` it is left without contents.

    Raises:
        CheckpointError: weights are missing (transformers would fill them at random), unexpected or of another shape.
    """
    # 1. Load the weights.
    with quiet(), _explained(directory):
        whole_config = read_model_config(directory)
        config = whole_config.get_text_config()
        if num_blocks is not None and num_blocks < config.num_hidden_layers:
            cut_blocks(config, num_blocks)
        headers, streaming = (model_tensors(directory), None) if devices is None else (None, streaming_options(devices))
        model, report = load_or_lay_out(auto, directory, config, whole_config, dtype, headers, streaming)
    # 2. Refuse what transformers reports.
    depth, headless = len(blocks_of(model)), auto is AutoModel
    faults = (
        ("lacks", set(report["missing_keys"])),
        ("has unexpected", {name for name in report["unexpected_keys"] if not _unused(name, depth, headless)}),
        ("has in another shape than config.json implies", {str(key[0]) for key in report["mismatched_keys"]}),
    )
    if problems := [f"{fault} {some_of(names)}" for fault, names in faults if names]:
        raise CheckpointError(
            f"the base model {directory} does not fit its config.json: it {'; it '.join(problems)}. Missing weights would be "
            "random. Get the complete model."
        )
    return model


def _own_names(model: Any, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return stored weights under this model's names: without a multimodal wrapper, and without prefix for a headless model."""
    kept = {name: tensor for name, tensor in stored.items() if not NOT_TEXT.match(name)}
    names = text_names(kept)
    if not hasattr(model, "lm_head"):
        names = [name.removeprefix(f"{model.base_model_prefix}.") for name in names]
    return dict(zip(names, kept.values(), strict=True))


def _unused(name: str, depth: int, headless: bool) -> bool:
    """Return whether a cut or headless text model does not use a weight."""
    block = BLOCK_TENSOR.match(name)
    is_above = block is not None and int(block[2]) >= depth
    return is_above or bool(NOT_TEXT.match(name)) or (headless and name.startswith("lm_head."))


def _tied(name: str, model: Any) -> bool:
    """Return whether a stored weight is the head's copy of the token embeddings, which the model shares."""
    return name == "lm_head.weight" and model.get_output_embeddings().weight is model.get_input_embeddings().weight


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn library errors into a CheckpointError that names the model; out-of-memory errors pass through."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"the base model {directory} cannot be loaded by transformers {transformers.__version__} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}). Check that its files are complete, and that transformers supports this "
            "architecture."
        ) from error


def load_base_tokenizer(directory: Path) -> Any:
    """Load the base model's own tokenizer, which decodes sampled tokens."""
    with quiet(), _explained(directory):
        return read_tokenizer(directory)
