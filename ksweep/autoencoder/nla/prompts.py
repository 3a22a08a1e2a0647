"""Prompts as token ids: the AV's, with the marker's place; the AR's, around each explanation; and reading an explanation back.

Tokenizers drift silently (a dropped BOS costs Gemma's AR more than half of its variance explained), so every id that the
sidecar states is compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.nla.checkpoint import CheckpointInfo
from ksweep.autoencoder.nla.sidecar import begun_answer
from ksweep.utils import files
from ksweep.utils.bos_token import document_bos, one_bos, puts_bos
from ksweep.utils.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from ksweep.autoencoder.base import ParseOutcome
    from ksweep.inference.backend import FinishReason

EXPLANATION = re.compile(r"<explanation>(.*?)</explanation>", re.DOTALL)
THOUGHTS = re.compile(r"\s*<think>(.*?)(?:</think>|$)", re.DOTALL)
DRIFT = "The tokenizer is not the one that the checkpoint was trained with: use the tokenizer files that were released with it."


def parse_explanation(text: str, finish: FinishReason) -> tuple[str | None, ParseOutcome]:
    """What stands between the first <explanation> and the next </explanation>, stripped; or None and why there is nothing.

    A draw that was cut off after its closing tag is complete and counts as ok: what was cut is never shown to the AR. (The public
    training code counted such draws as failed, the public client did not.) Thoughts before the answer, between <think> and
    </think>, are passed over: they may mention the tags.
    """
    if thoughts := THOUGHTS.match(text):
        text = text[thoughts.end() :]
    match = EXPLANATION.search(text)
    if match:
        explanation = match[1].strip()
        return (explanation, "ok") if explanation else (None, "empty")
    if finish == "length":
        return None, "cut_off"
    return None, "no_close_tag" if "<explanation>" in text else "no_open_tag"


@dataclass(frozen=True)
class AvPrompt:
    """The AV's prompt: the same for every activation."""

    ids: tuple[int, ...]
    position: int
    """Where the marker stands, whose row is replaced."""


def av_prompt(info: CheckpointInfo, tokenizer: Any) -> AvPrompt:
    """Chat-template the AV's message, and check the marker and its surroundings against the sidecar.

    Raises:
        CheckpointError: no chat template; BOS missing or doubled; the marker split, unknown, absent, repeated or elsewhere.
    """
    sidecar = info.sidecar
    assert sidecar.marker is not None and sidecar.marker_id is not None
    found = tokenizer.encode(sidecar.marker, add_special_tokens=False)
    if found != [sidecar.marker_id] or sidecar.marker_id == tokenizer.unk_token_id:
        unknown = ", the unknown token" if found == [tokenizer.unk_token_id] else ""
        raise CheckpointError(
            f"AV {info.path}: the marker {sidecar.marker!r} is tokenized as {found}{unknown}; the sidecar says "
            f"injection_token_id={sidecar.marker_id}. {DRIFT}"
        )
    message = [{"role": "user", "content": sidecar.av_message}]
    ids = _chat_ids(info, tokenizer, message)
    if sidecar.asks_for_thinking and _chat_ids(info, tokenizer, message, enable_thinking=True) != ids:
        raise CheckpointError(
            f"AV {info.path}: its sidecar says enable_thinking: true, with which its chat template renders another prompt than "
            "by default, and arguments of chat templates are not supported yet. Use an AV that was trained with the default."
        )
    _check_chat_bos(info, tokenizer, ids)
    sites = [i for i, token in enumerate(ids) if token == sidecar.marker_id]
    if len(sites) != 1 or not 0 < sites[0] < len(ids) - 1:
        raise CheckpointError(
            f"AV {info.path}: the marker {sidecar.marker!r} stands at positions {sites} of the {len(ids)} prompt tokens, "
            "expected exactly one place inside. "
            "Use the chat template and prompt template that were released with the checkpoint."
        )
    around, said = (ids[sites[0] - 1], ids[sites[0] + 1]), (sidecar.left_id, sidecar.right_id)
    if any(id_said not in (None, found) for id_said, found in zip(said, around, strict=True)):
        raise CheckpointError(
            f"AV {info.path}: the marker stands between the tokens {around[0]} and {around[1]}; the sidecar says "
            f"{said[0]} and {said[1]}. {DRIFT}"
        )
    _check_end(info, tokenizer.decode(ids[sites[0] + 1 :]))
    return AvPrompt(tuple(ids), sites[0])


def stop_token_ids(info: CheckpointInfo, tokenizer: Any) -> frozenset[int]:
    """Every end-of-sequence id of tokenizer, config.json and generation_config.json (Gemma's <end_of_turn> is only in the last).

    Nothing else is read of generation_config.json: its temperature, top_k and repetition penalty are the base model's habits.
    """
    found: list[Any] = [tokenizer.eos_token_id, info.config.get("eos_token_id")]
    for directory in dict.fromkeys((info.path, info.weights)):
        for name in ("generation_config.json", "config.json"):
            if (directory / name).exists():
                found.append(files.read_json(directory / name, "model configuration").get("eos_token_id"))
    ids = {i for value in found for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    if not ids:
        raise CheckpointError(
            f"AV {info.path}: neither tokenizer nor config.json nor generation_config.json names an end-of-sequence token, so "
            "no draw would ever end. "
            "Add eos_token_id to config.json."
        )
    return frozenset(ids)


def _common_beginning(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest beginning of all rows, less one token, so that something is left of each."""
    shortest = min(map(len, rows))
    equal = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    return tuple(rows[0][: min(equal, shortest - 1)])


class ArPrompts:
    """Explanations -> token ids of the AR's prompt, each checked."""

    def __init__(self, info: CheckpointInfo, tokenizer: Any, num_embeddings: int) -> None:
        """Raises CheckpointError: a probe shows that BOS is missing, something is appended, or the suffix is another."""
        self._info, self._tokenizer, self._num_embeddings = info, tokenizer, num_embeddings
        self._before, self._after = info.sidecar.ar_affixes
        self._limit: int | None = info.config.get("max_position_embeddings")
        self._before = one_bos(self._before, tokenizer)
        self._bos = _document_bos(info, tokenizer)
        begins = tokenizer.encode(f"{self._before}x{self._after}", add_special_tokens=False)[:1]
        self._adds_special = self._bos is None or begins != [self._bos]  # a template that begins with BOS gets no second one
        self.common = _common_beginning(self.ids(["A", "zebra", "1", ""], check_suffix=False))
        """Tokens that prompts begin with. A text may still merge with the last of them: look before relying on it."""
        for probe in ("", "A probe."):
            self._check_specials(probe)
            self._check_suffix(probe, self.ids([probe], check_suffix=False)[0])

    def ids(self, explanations: Sequence[str], check_suffix: bool = True) -> list[list[int]]:
        """Token ids with special tokens, never truncated; the explanation is inserted verbatim, braces and all.

        Raises:
            DataError: a prompt longer than the model's context.
            CheckpointError: a token the model has no row for, another suffix.
        """
        if not explanations:
            return []
        prompts = [self._before + text + self._after for text in explanations]
        encoded = self._tokenizer(prompts, add_special_tokens=self._adds_special, padding=False, truncation=False)
        rows: list[list[int]] = encoded["input_ids"]
        for text, row in zip(explanations, rows, strict=True):
            self._check_size(text, row)
            if check_suffix:
                self._check_suffix(text, row)
        return rows

    def _check_size(self, text: str, row: list[int]) -> None:
        if self._limit is not None and len(row) > self._limit:
            raise DataError(
                f"an explanation of {len(text)} characters ({text[:60]!r}...) makes an AR prompt of {len(row)} tokens; AR "
                f"{self._info.path} takes {self._limit} "
                "at most, and cutting it would lose the place it reads from. Lower sampling.max_new_tokens."
            )
        if max(row) >= self._num_embeddings:
            raise CheckpointError(
                f"AR {self._info.path}: its tokenizer gives token {max(row)}, but the model has {self._num_embeddings} rows. "
                f"{DRIFT}"
            )

    def _check_suffix(self, text: str, row: list[int]) -> None:
        expected = self._info.sidecar.suffix_ids
        if expected and tuple(row[-len(expected) :]) != expected:
            raise CheckpointError(
                f"AR {self._info.path}: the prompt of {text[:60]!r} ends with the tokens {row[-len(expected) :]}, the "
                f"sidecar's critic_suffix_ids are {list(expected)}. {DRIFT}"
            )

    def _check_specials(self, probe: str) -> None:
        text = self._before + probe + self._after
        ids, plain = self._tokenizer.encode(text), self._tokenizer.encode(text, add_special_tokens=False)
        if not self._adds_special or ids == ([] if self._bos is None else [self._bos]) + plain:
            return
        if self._bos is not None and ids[:1] != [self._bos]:
            raise CheckpointError(
                f"AR {self._info.path}: its tokenizer has the BOS token {self._tokenizer.bos_token!r} ({self._bos}) but does "
                f"not put it before a text; prompts start with {ids[:3]}. "
                "An AR trained with BOS loses most of its accuracy without it: restore the post_processor in tokenizer.json "
                "(or say add_bos_token: false in "
                "tokenizer_config.json if it was trained without)."
            )
        raise CheckpointError(
            f"AR {self._info.path}: its tokenizer makes [{', '.join(map(str, ids[:2]))} ... {', '.join(map(str, ids[-2:]))}] "
            f"of a prompt, expected {'one BOS and ' if self._bos is not None else ''}"
            f"the text alone, ending in {plain[-2:]}. The AR reads at the last token: turn off add_eos_token and whatever else "
            "adds tokens."
        )


def _check_end(info: CheckpointInfo, after_marker: str) -> None:
    """Raises CheckpointError: the prompt has already begun the answer, behind the message that the sidecar's template is."""
    message = info.sidecar.av_message.partition(info.sidecar.marker or "")[2].strip()
    if tag := begun_answer(after_marker.rpartition(message)[2] if message else after_marker):
        raise CheckpointError(
            f"AV {info.path}: its chat template ends the prompt with the open tag {tag}, so that the answer begins "
            "inside it, which is not supported yet: explanations would be missed, or thoughts taken for them. Use an AV whose "
            "answers hold <explanation>...</explanation>."
        )


def _chat_ids(info: CheckpointInfo, tokenizer: Any, messages: list[dict[str, str]], **arguments: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"AV {info.path}: its tokenizer has no chat template, which the prompt is built with. Add chat_template.jinja, as "
            "released."
        )
    # transformers 5 returns a BatchEncoding unless told otherwise, and iterating over that gives its keys.
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False, **arguments
    )
    return ids


def _check_chat_bos(info: CheckpointInfo, tokenizer: Any, ids: list[int]) -> None:
    bos, writes_bos = tokenizer.bos_token_id, "bos_token" in str(tokenizer.chat_template)
    if bos is not None and ids[:2] == [bos, bos]:
        raise CheckpointError(
            f"AV {info.path}: the prompt starts with two BOS tokens ({tokenizer.bos_token!r}). Use the chat template and "
            "tokenizer as released."
        )
    if writes_bos and (bos is None or ids[:1] != [bos]):
        raise CheckpointError(
            f"AV {info.path}: its chat template writes the BOS token, but the prompt starts with {ids[:3]} (BOS of the "
            f"tokenizer: {tokenizer.bos_token!r}). {DRIFT}"
        )


def _document_bos(info: CheckpointInfo, tokenizer: Any) -> int | None:
    """The BOS that every AR prompt must start with; None for models that have none, or whose "BOS" is a turn marker.

    The public rule is "a tokenizer with a BOS must prepend it". SmolLM2 calls <|im_start|> its BOS and GPT-2 its end of text, and
    neither starts a document with it; they are told by BOS = EOS, by a chat that holds it more than once, or by
    `add_bos_token: false`.
    """
    config = info.tokenizer / "tokenizer_config.json"
    is_off = config.exists() and files.read_json(config, "tokenizer configuration").get("add_bos_token") is False
    return None if is_off and not puts_bos(tokenizer) else document_bos(tokenizer)
