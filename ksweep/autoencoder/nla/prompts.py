"""Build the AV's and AR's prompts as token ids, and parse explanations out of the AV's texts.

Tokenizers change between versions without a warning, and a dropped BOS costs Gemma's AR more than half of its variance explained.
So every token id that the sidecar states is compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.nla.checkpoint import CheckpointInfo
from ksweep.autoencoder.nla.sidecar import opened_answer_tag
from ksweep.utils import files
from ksweep.utils.bos_token import document_bos, one_bos, puts_bos
from ksweep.utils.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from ksweep.autoencoder.base import ParseOutcome
    from ksweep.inference.backend import FinishReason

EXPLANATION = re.compile(r"<explanation>(.*?)</explanation>", re.DOTALL)
THOUGHTS = re.compile(r"\s*<think>(.*?)(?:</think>|$)", re.DOTALL)
DRIFT = "The tokenizer is not the one that the checkpoint was trained with. Use the tokenizer files that were released with it."


def parse_explanation(text: str, finish: FinishReason) -> tuple[str | None, ParseOutcome]:
    """Return the stripped text between the first <explanation> and the next </explanation> and "ok", or None and the failure.

    A draw that was cut off after its closing tag is complete and counts as ok, because the AR never reads what follows the tag.
    (The public training code counted such draws as failed, the public client did not.)
    """
    # 1. Skip thoughts between <think> and </think> before the answer, which may mention the tags.
    if thoughts := THOUGHTS.match(text):
        text = text[thoughts.end() :]
    # 2. Take what the first pair of tags encloses.
    match = EXPLANATION.search(text)
    if match:
        explanation = match[1].strip()
        return (explanation, "ok") if explanation else (None, "empty")
    # 3. Name the failure.
    if finish == "length":
        return None, "cut_off"
    return None, "no_close_tag" if "<explanation>" in text else "no_open_tag"


@dataclass(frozen=True)
class AvPrompt:
    """The AV's prompt, which is the same for every activation."""

    ids: tuple[int, ...]
    position: int
    """Index of the marker, whose embedding row is replaced."""


def av_prompt(info: CheckpointInfo, tokenizer: Any) -> AvPrompt:
    """Return the AV's message in its chat template, once the marker and the tokens beside it match the sidecar.

    Raises:
        CheckpointError: there is no chat template, BOS is missing or doubled, or the marker is split, unknown, absent,
            repeated or between other tokens.
    """
    sidecar = info.sidecar
    # 1. Check that the marker is the one token that the sidecar states.
    _check_marker_token(info, tokenizer)
    # 2. Render the chat template, and check its default and its BOS.
    message = [{"role": "user", "content": sidecar.av_message}]
    ids = _chat_ids(info, tokenizer, message)
    if sidecar.asks_for_thinking and _chat_ids(info, tokenizer, message, enable_thinking=True) != ids:
        raise CheckpointError(
            f"AV {info.path}: its sidecar says enable_thinking: true, with which its chat template renders another prompt than "
            "by default. Arguments of chat templates are not supported yet. Use an AV that was trained with the default."
        )
    _check_chat_bos(info, tokenizer, ids)
    # 3. Find the marker, and compare the tokens beside it.
    position = _marker_position(info, ids)
    # 4. Check that the answer is not begun after it.
    _check_end(info, tokenizer.decode(ids[position + 1 :]))
    return AvPrompt(tuple(ids), position)


def _check_marker_token(info: CheckpointInfo, tokenizer: Any) -> None:
    sidecar = info.sidecar
    assert sidecar.marker is not None and sidecar.marker_id is not None
    marker_ids = tokenizer.encode(sidecar.marker, add_special_tokens=False)
    if marker_ids != [sidecar.marker_id] or sidecar.marker_id == tokenizer.unk_token_id:
        unknown = ", the unknown token" if marker_ids == [tokenizer.unk_token_id] else ""
        raise CheckpointError(
            f"AV {info.path}: the marker {sidecar.marker!r} is tokenized as {marker_ids}{unknown}; the sidecar says "
            f"injection_token_id={sidecar.marker_id}. {DRIFT}"
        )


def _marker_position(info: CheckpointInfo, ids: Sequence[int]) -> int:
    """Return the index of the marker in the prompt; its neighbours are compared with the ids that the sidecar states."""
    sidecar = info.sidecar
    positions = [i for i, token in enumerate(ids) if token == sidecar.marker_id]
    if len(positions) != 1 or not 0 < positions[0] < len(ids) - 1:
        raise CheckpointError(
            f"AV {info.path}: the marker {sidecar.marker!r} is at positions {positions} of the {len(ids)} prompt tokens, "
            "expected exactly one position, neither the first nor the last. Use the chat template and prompt template that were "
            "released with the checkpoint."
        )
    [position] = positions
    neighbours, stated = (ids[position - 1], ids[position + 1]), (sidecar.left_id, sidecar.right_id)
    if any(expected not in (None, actual) for expected, actual in zip(stated, neighbours, strict=True)):
        raise CheckpointError(
            f"AV {info.path}: the marker is between the tokens {neighbours[0]} and {neighbours[1]}; the sidecar says "
            f"{stated[0]} and {stated[1]}. {DRIFT}"
        )
    return position


def stop_token_ids(info: CheckpointInfo, tokenizer: Any) -> frozenset[int]:
    """Return the end-of-sequence ids of tokenizer, config.json and generation_config.json, which alone has Gemma's <end_of_turn>.

    Nothing else in generation_config.json is used: its temperature, top_k and repetition penalty are the base model's defaults.
    """
    values: list[Any] = [tokenizer.eos_token_id, info.config.get("eos_token_id")]
    for directory in dict.fromkeys((info.path, info.weights)):
        for name in ("generation_config.json", "config.json"):
            if (directory / name).exists():
                values.append(files.read_json(directory / name, "model configuration").get("eos_token_id"))
    ids = {i for value in values for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    if not ids:
        raise CheckpointError(
            f"AV {info.path}: neither tokenizer nor config.json nor generation_config.json names an end-of-sequence token, so "
            "every draw would run to max_new_tokens. Add eos_token_id to config.json."
        )
    return frozenset(ids)


def _common_prefix(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest common prefix of all rows that leaves at least one token of each."""
    shortest = min(map(len, rows))
    equal = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    return tuple(rows[0][: min(equal, shortest - 1)])


class ArPrompts:
    """The AR's prompts: turns explanations into token ids and checks each of them."""

    def __init__(self, info: CheckpointInfo, tokenizer: Any, num_embeddings: int) -> None:
        """Prepare the template's text around an explanation, and check the tokenizer on two probe texts.

        Raises:
            CheckpointError: BOS is missing, a special token is appended, or the last tokens are not the sidecar's suffix.
        """
        self._info, self._tokenizer, self._num_embeddings = info, tokenizer, num_embeddings
        self._before, self._after = info.sidecar.ar_affixes
        self._limit: int | None = info.config.get("max_position_embeddings")
        self._before = one_bos(self._before, tokenizer)
        self._bos = _document_bos(info, tokenizer)
        first = tokenizer.encode(f"{self._before}x{self._after}", add_special_tokens=False)[:1]
        self._adds_special = self._bos is None or first != [self._bos]  # a template that begins with BOS gets no second one
        self.common = _common_prefix(self.ids(["A", "zebra", "1", ""], check_suffix=False))
        """Tokens that most prompts begin with. A text may merge with the last of them, so each prompt must be compared."""
        for probe in ("", "A probe."):
            self._check_specials(probe)
            self._check_suffix(probe, self.ids([probe], check_suffix=False)[0])

    def ids(self, explanations: Sequence[str], check_suffix: bool = True) -> list[list[int]]:
        """Return the token ids of each explanation's prompt, with special tokens and never truncated.

        The explanation is inserted verbatim, including braces.

        Raises:
            DataError: a prompt is longer than the model's context.
            CheckpointError: the model has no embedding row for a token, or the last tokens are not the sidecar's suffix.
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
                f"{self._info.path} takes {self._limit} at most, and truncation would remove the token that it is read at. Lower "
                "sampling.max_new_tokens."
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
                "An AR trained with BOS loses most of its accuracy without it. Restore the post_processor in tokenizer.json, or "
                "set add_bos_token: false in tokenizer_config.json if the AR was trained without BOS."
            )
        raise CheckpointError(
            f"AR {self._info.path}: its tokenizer makes [{', '.join(map(str, ids[:2]))} ... {', '.join(map(str, ids[-2:]))}] "
            f"of a prompt, expected {'one BOS and ' if self._bos is not None else ''}"
            f"the text alone, ending in {plain[-2:]}. The AR is read at the last token. Turn off add_eos_token and every other "
            "setting that adds tokens."
        )


def _check_end(info: CheckpointInfo, after_marker: str) -> None:
    """Check that the chat template does not begin the answer after the AV's message.

    Raises:
        CheckpointError: the prompt ends with an open tag.
    """
    message = info.sidecar.av_message.partition(info.sidecar.marker or "")[2].strip()
    if tag := opened_answer_tag(after_marker.rpartition(message)[2] if message else after_marker):
        raise CheckpointError(
            f"AV {info.path}: its chat template ends the prompt with the open tag {tag}, so the answer begins inside that tag. "
            "This is not supported yet: explanations would be missed, or thoughts taken for explanations. Use an AV whose "
            "answers contain <explanation>...</explanation>."
        )


def _chat_ids(info: CheckpointInfo, tokenizer: Any, messages: list[dict[str, str]], **arguments: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"AV {info.path}: its tokenizer has no chat template to build the prompt with. Add the released chat_template.jinja."
        )
    # By default transformers 5 returns a BatchEncoding, and iterating over that yields its keys.
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
    """Return the BOS that every AR prompt must start with; None for models without one, or whose "BOS" is a turn marker.

    The public rule is "a tokenizer with a BOS must prepend it". But SmolLM2 names <|im_start|> as its BOS, and GPT-2 its
    end-of-text token, and neither begins a document with it. Such models are recognised by BOS = EOS, by a chat that contains BOS
    more than once, or by `add_bos_token: false`.
    """
    config = info.tokenizer / "tokenizer_config.json"
    is_off = config.exists() and files.read_json(config, "tokenizer configuration").get("add_bos_token") is False
    return None if is_off and not puts_bos(tokenizer) else document_bos(tokenizer)
