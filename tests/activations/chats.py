"""Tiny models whose tokenizers know a chat format, and conversations written piece by piece with the role of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.activations.helpers import SENTENCE
from tests.tiny_models import make_base

Piece = tuple[str, str]

MARKERS: dict[str, list[str]] = {
    "gemma": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "harmony": ["<|endoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
}
BOS = {"gemma": "<bos>", "llama3": "<|begin_of_text|>"}
PAD = {"gemma": "<pad>", "chatml": "<|endoftext|>", "llama3": "<|finetune_right_pad_id|>", "harmony": "<|endoftext|>"}
TEMPLATES = list(MARKERS)


def turn(template: str, role: str, words: str) -> list[Piece]:
    """One message as the format's own documentation writes it."""
    name = "model" if (template, role) == ("gemma", "assistant") else role
    if template == "gemma":
        return [(f"<start_of_turn>{name}\n", "special"), (words, role), ("<end_of_turn>", "special"), ("\n", "other")]
    if template == "chatml":
        return [(f"<|im_start|>{name}\n", "special"), (words, role), ("<|im_end|>", "special"), ("\n", "other")]
    if template == "llama3":
        return [(f"<|start_header_id|>{name}<|end_header_id|>\n\n", "special"), (words, role), ("<|eot_id|>", "special")]
    channel = "<|channel|>final" if role == "assistant" else ""
    return [(f"<|start|>{name}{channel}<|message|>", "special"), (words, role), ("<|end|>", "special")]


def conversation(template: str, *turns: tuple[str, str]) -> list[Piece]:
    return [piece for role, words in turns for piece in turn(template, role, words)]


def written(pieces: list[Piece]) -> str:
    return "".join(text for text, _ in pieces)


def roles_by_offset(tokenizer: Any, pieces: list[Piece]) -> list[str]:
    """The role of each token of a conversation, by where in the text the token begins; BOS lies nowhere."""
    encoded = tokenizer(written(pieces), return_offsets_mapping=True)
    of_character = [role for text, role in pieces for _ in text]
    return ["special" if start == end else of_character[start] for start, end in encoded["offset_mapping"]]


def make_chat_base(path: Path, template: str) -> Path:
    """A random model with a small tokenizer of the kind that the format's models have: SentencePiece-like or byte-level."""
    make_base(path, "llama", num_layers=2, d_model=16)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).unlink()
    PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(template),
        pad_token=PAD[template],
        bos_token=BOS.get(template),
        eos_token=MARKERS[template][-1],
    ).save_pretrained(path)
    return path


def _tokenizer(template: str) -> Tokenizer:
    out = Tokenizer(models.BPE(unk_token=None))
    if template == "gemma":
        out.normalizer = normalizers.Replace(" ", "▁")
        out.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        out.decoder = decoders.Replace("▁", " ")
        alphabet = ["\n"]
    else:
        out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        out.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=MARKERS[template], initial_alphabet=alphabet, show_progress=False
    )
    out.train_from_iterator([f"{SENTENCE} user assistant system model final"] * 3, trainer)
    if bos := BOS.get(template):
        ids = [(bos, out.token_to_id(bos))]
        out.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return out
