"""Check that an AV or AR can be loaded and prompted, with everything that loading checks and no weights of its model."""

from __future__ import annotations

from typing import Any

import torch

from ksweep.autoencoder.nla.checkpoint import CheckpointInfo
from ksweep.autoencoder.nla.loading import lay_out_model, load_ar_head, load_layer_mean, load_nla_tokenizer
from ksweep.autoencoder.nla.prompts import ArPrompts, av_prompt, check_embedded, stop_token_ids
from ksweep.utils.errors import CheckpointError, RequestError


def check_loading(info: CheckpointInfo) -> None:
    """Check a half before a job is submitted: its model by headers alone, its tokenizer, its prompt, and the small files.

    Raises:
        CheckpointError: as loading would: weights are missing, unexpected or of another shape than the model's own, transformers
            does not know or cannot run the architecture, a package for quantised weights is not installed, the prompt is not as
            the sidecar says, or an AR's head or an adapter is damaged.
    """
    model = lay_out_model(info)
    tokenizer, num_embeddings = load_nla_tokenizer(info), model.get_input_embeddings().num_embeddings
    try:
        _check_prompts(info, tokenizer, num_embeddings)
    except RequestError:
        raise
    except Exception as error:  # a tokenizer takes settings as they come, and fails in its own way when it is used
        raise CheckpointError(
            f"the tokenizer in {info.tokenizer} cannot be used ({type(error).__name__}: {str(error)[:300]}). Compare "
            "tokenizer_config.json and tokenizer.json with those of the base model, or download them again."
        ) from error
    if info.role == "av":
        return
    load_ar_head(info, torch.float32, torch.device("cpu"))
    load_layer_mean(info)


def _check_prompts(info: CheckpointInfo, tokenizer: Any, num_embeddings: int) -> None:
    if info.role == "av":
        check_embedded(info, av_prompt(info, tokenizer), num_embeddings)
        stop_token_ids(info, tokenizer)
    else:
        ArPrompts(info, tokenizer, num_embeddings)
