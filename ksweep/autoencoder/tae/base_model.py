"""The language model under a talkative-autoencoder's decoder or encoder: loaded, checked, its trained weights laid over it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ksweep.autoencoder.safetensors_header import BLOCK_TENSOR, NOT_TEXT, WRAPPED, text_names
from ksweep.autoencoder.transformers_models import LIBRARY_ERRORS, blocks_of, cut_blocks, is_sane, quiet
from ksweep.inference.device_map import place_model
from ksweep.utils.errors import CheckpointError
from ksweep.utils.text import some_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float

STARTS_AT_ZERO = re.compile(r"bias$|^special_last_token_vector$|^prompt_ids$")


def load_decoder_model(
    directory: Path, stored: Mapping[str, torch.Tensor], dtype: torch.dtype, devices: Sequence[torch.device], path: Path
) -> Any:
    """The decoder's model, frozen: the base, with the weights that the checkpoint's decoder holds in their place.

    Final logit soft-capping is off, as it was in training (Gemma-2), soft-capping of attention is as the base has it.
    """
    model = _load(AutoModelForCausalLM, directory, None, dtype)
    replace_weights(model, stored, path, "decoder")
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        model.config.final_logit_softcapping = None
    model.generation_config = transformers.GenerationConfig()
    # logits_to_keep hands lm_head a strided [row, 1, d] slice, which torch multiplies as a batch, weights copied for each row.
    model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: (args[0].contiguous(), *args[1:]))
    return _ready(model, directory, devices)


def load_encoder_model(
    directory: Path,
    num_blocks: int,
    stored: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    path: Path,
) -> tuple[Any, Float[torch.Tensor, "token d_model"]]:
    """The encoder's model, frozen: embeddings and the first blocks, no head; and the base's own token embeddings.

    The second are those of the first unless the checkpoint's encoder holds other ones.
    """
    model = _load(AutoModel, directory, num_blocks, dtype)
    table = model.get_input_embeddings().weight
    own = table.detach().clone() if stored else table
    replace_weights(model, stored, path, "encoder")
    return _ready(model, directory, devices), own.detach().to(devices[0])


def embedding_scale(model: Any) -> Float[torch.Tensor, ""]:
    """What the model's embedding module multiplies its table by (Gemma: sqrt(d) in the model's dtype; others: 1).

    Whoever hands embeddings to the model in place of tokens must multiply by it.

    Raises:
        CheckpointError: the module does something else than multiply.
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
    """The factor that the reference's encoder uses: Gemma-3's is not rounded to the dtype (73.32, not 73.5, for d 5376)."""
    config = model.config.get_text_config()
    return math.sqrt(config.hidden_size) if config.model_type.startswith("gemma3") else float(embedding_scale(model))


def replace_weights(model: Any, stored: Mapping[str, torch.Tensor], path: Path, role: str) -> None:
    """Replaces the model's weights by those in the checkpoint; all of them, or none if it has none.

    Weights of blocks that were left out, and of a head or final norm that the model does not have, stay unused.

    Raises:
        CheckpointError: every weight that is missing, unexpected or of another shape.
    """
    if not stored:
        return
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
    found = (("lack", missing), ("have unexpected", extra), ("have in another shape", shapes))
    if problems := [f"{what} {some_of(names)}" for what, names in found if names]:
        raise CheckpointError(
            f"the base weights that the {role} in {path} was trained with {'; they '.join(problems)}. They do not belong to the "
            "base model they should replace: check autoencoder.base, or get the whole file."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])


def check_contents(tensors: Mapping[str, torch.Tensor], role: str, path: Path) -> None:
    """Finite, of sane size, and nothing but zeros only where training starts from zero: biases, and the special vector.

    Raises:
        CheckpointError: naming the tensors that are not.
    """
    broken = [name for name, tensor in tensors.items() if not is_sane(tensor)]
    dead = [name for name, tensor in tensors.items() if not STARTS_AT_ZERO.search(name) and not _lives(tensor)]
    for names, what in ((broken, "NaN, infinite or absurdly large values"), (dead, "nothing but zeros")):
        if names:
            raise CheckpointError(
                f"the {role} in {path} holds {what} in {some_of(names)}: the training run broke down, or the file is damaged. "
                "Use another checkpoint of the run."
            )


def is_identity(weight: Float[torch.Tensor, "*stack d d"]) -> bool:
    """A projection (or every one of a stack) as training started from, untrained."""
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return all(torch.equal(one, eye) for one in weight.reshape(-1, *eye.shape))


def _lives(tensor: torch.Tensor) -> bool:
    """Not all zero; of a stack of matrices none is."""
    return bool(tensor.detach().flatten(1).any(dim=1).all() if tensor.ndim == 3 else tensor.detach().any())


def _load(auto: Any, directory: Path, num_blocks: int | None, dtype: torch.dtype) -> Any:
    """transformers' loader for a base model, cut to its first blocks; no weight in use is left at random."""
    with quiet(), _explained(directory):
        config = AutoConfig.from_pretrained(directory).get_text_config()
        whole = config.num_hidden_layers
        if num_blocks is not None and num_blocks < whole:
            cut_blocks(config, num_blocks)
        model, report = auto.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            # Only eager attention applies Gemma-2's soft-capping of attention logits.
            attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa",
            key_mapping=WRAPPED,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they come back in the report, with their names
            local_files_only=True,
        )
    depth, headless = len(blocks_of(model)), auto is AutoModel
    found = (
        ("lacks", set(report["missing_keys"])),
        ("has unexpected", {name for name in report["unexpected_keys"] if not _unused(name, depth, headless)}),
        ("has in another shape than config.json implies", {str(key[0]) for key in report["mismatched_keys"]}),
    )
    if problems := [f"{what} {some_of(names)}" for what, names in found if names]:
        raise CheckpointError(
            f"the base model {directory} does not fit its config.json: it {'; it '.join(problems)}. Missing weights would be "
            "random. Get the whole model."
        )
    return model


def _own_names(model: Any, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored weights as this model spells them: without a multimodal wrapper, and for a headless model without its prefix."""
    kept = {name: tensor for name, tensor in stored.items() if not NOT_TEXT.match(name)}
    names = text_names(kept)
    if not hasattr(model, "lm_head"):
        names = [name.removeprefix(f"{model.base_model_prefix}.") for name in names]
    return dict(zip(names, kept.values(), strict=True))


def _unused(name: str, depth: int, headless: bool) -> bool:
    """A weight that a cut or headless text model does without."""
    block = BLOCK_TENSOR.match(name)
    beyond = block is not None and int(block[2]) >= depth
    return beyond or bool(NOT_TEXT.match(name)) or (headless and name.startswith("lm_head."))


def _tied(name: str, model: Any) -> bool:
    """The head's copy of the token embeddings: stored, but no weight of its own."""
    return name == "lm_head.weight" and model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _ready(model: Any, directory: Path, devices: Sequence[torch.device]) -> Any:
    """Frozen, in evaluation mode, on its devices, every weight finite."""
    if broken := [name for name, parameter in model.named_parameters() if not is_sane(parameter)]:
        raise CheckpointError(
            f"the model over {directory} has NaN, infinite or absurdly large weights (as {model.dtype}) in {some_of(broken)}. "
            "Get intact weights; if they were intact as bfloat16, do not load them as float16."
        )
    return place_model(model.requires_grad_(False).eval(), devices)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"the base model {directory} cannot be loaded by transformers {transformers.__version__} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}). Check that its files are whole, and that this architecture is known."
        ) from error


def load_base_tokenizer(directory: Path) -> Any:
    """The base model's own tokenizer, for showing what was said."""
    with quiet(), _explained(directory):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
