"""Build the AV's and AR's prompts as token ids, and parse explanations out of the AV's texts.

Tokenizers change between versions without a warning, and a dropped BOS costs Gemma's AR more than half of its variance explained.
So every token id that the sidecar states is compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.nla.checkpoint import CheckpointInfo
from ksweep.autoencoder.nla.sidecar import ENCLOSING_TAGS, opened_answer_tag
from ksweep.autoencoder.prompting import AvPrompting, ReplaceEmbedding
from ksweep.utils import files
from ksweep.utils.bos_token import document_bos, one_bos, puts_bos
from ksweep.utils.chat_template import default_template
from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.template_date import dated

if TYPE_CHECKING:
    from ksweep.autoencoder.base import ParseOutcome
    from ksweep.inference.prompts import FinishReason

TAGGED = AvPrompting(injection=ReplaceEmbedding(1), template="", marker="")
"""Prompting with the usual tags."""
THOUGHTS = re.compile(r"\s*<think>(.*?)(?:</think>|$)", re.DOTALL)
DRIFT = "The tokenizer is not the one that the checkpoint was trained with. Use the tokenizer files that were released with it."


def parse_explanation(text: str, finish: FinishReason, prompting: AvPrompting = TAGGED) -> tuple[str | None, ParseOutcome]:
    """Return the stripped text between the first opening tag and the next closing tag and "ok", or None and the failure.

    An empty opening tag stands for the beginning of the answer, an empty closing tag for its end.

    A draw that was cut off after its closing tag is complete and counts as ok, because the AR never reads what follows the tag.
    (The public training code counted such draws as failed, the public client did not.)
    """
    # 1. Skip thoughts between <think> and </think> before the answer, which may mention the tags.
    if thoughts := THOUGHTS.match(text):
        text = text[thoughts.end() :]
    # 2. Take what the first pair of tags encloses.
    opening, closing = prompting.opening_tag, prompting.closing_tag
    _, opened, rest = text.partition(opening) if opening else ("", True, text)
    explanation, closed, _ = rest.partition(closing) if closing else (rest, True, "")
    if opened and (closed or not prompting.must_close):
        return (stripped, "ok") if (stripped := explanation.strip()) or prompting.empty_counts else (None, "empty")
    # 3. Name the failure.
    if finish == "length":
        return None, "cut_off"
    return None, "no_close_tag" if opened else "no_open_tag"


@dataclass(frozen=True)
class AvPrompt:
    """The AV's prompt, which is the same for every activation."""

    ids: tuple[int, ...]
    position: int
    """Index of the marker, whose embedding row is replaced."""


def check_embedded(info: CheckpointInfo, prompt: AvPrompt, num_embeddings: int) -> None:
    """Raise CheckpointError if the AV has no embedding row for a token of its prompt."""
    if max(prompt.ids) >= num_embeddings:
        raise CheckpointError(
            f"AV {info.path}: its prompt holds token {max(prompt.ids)}, but the model has {num_embeddings} embedding rows. "
            "Tokenizer and weights are of different models."
        )


def av_prompt(info: CheckpointInfo, tokenizer: Any) -> AvPrompt:
    """Return the AV's message in its chat template, once the marker and the tokens beside it match the sidecar.

    Raises:
        CheckpointError: there is no chat template, BOS is missing or doubled, or the marker is split, unknown, absent,
            repeated or between other tokens.
    """
    prompting = info.av_prompting
    # 1. Check that the marker is the one token that the sidecar states.
    marker_id = _marker_id(info, tokenizer)
    # 2. Render the chat template, and check its default and its BOS.
    if not prompting.is_chat:
        if prompting.chat_arguments:
            raise CheckpointError(
                f"AV {info.path} was trained without a chat template: leave out autoencoder.prompting.chat_arguments."
            )
        ids = tokenizer.encode(prompting.message + prompting.prefill, add_special_tokens=False)
        return AvPrompt(tuple(ids), _marker_position(info, ids, marker_id))
    message = [{"role": "user", "content": prompting.message}]
    arguments = dict(prompting.chat_arguments)
    _check_chat_arguments(info, tokenizer, arguments)
    ids = _chat_ids(info, tokenizer, message, **arguments)
    if prompting.states_prompt:
        ids = _stated_ids(info, tokenizer, message, ids)
    if (
        prompting.asks_for_thinking
        and "enable_thinking" not in arguments
        and _chat_ids(info, tokenizer, message, enable_thinking=True) != ids
    ):
        raise CheckpointError(
            f"AV {info.path}: its sidecar says enable_thinking: true, with which its chat template renders another prompt than "
            "by default. Say which one to use: autoencoder.prompting.chat_arguments={enable_thinking: true}, or false."
        )
    _check_chat_bos(info, tokenizer, ids)
    # 3. Check that the answer is not begun after the marker, and begin it as the prompting says.
    if marker_id in ids:
        _check_end(info, tokenizer.decode(ids[ids.index(marker_id) + 1 :]))
    ids = [*ids, *tokenizer.encode(prompting.prefill, add_special_tokens=False)] if prompting.prefill else ids
    # 4. Find the marker, and compare the tokens beside it.
    return AvPrompt(tuple(ids), _marker_position(info, ids, marker_id))


def _stated_ids(info: CheckpointInfo, tokenizer: Any, message: list[dict[str, str]], ids: list[int]) -> list[int]:
    """Return the rendering of the message that has the stated ids: the default one, or that without thinking, or with it.

    The stated ids may end in the beginning of the answer that the spec states too (`prefill`); it is left out.
    """
    prompting = info.av_prompting
    ids_of_text = [] if prompting.prompt_text is None else tokenizer.encode(prompting.prompt_text, add_special_tokens=False)
    if None not in (prompting.prompt_ids, prompting.prompt_text) and list(prompting.prompt_ids or ()) != ids_of_text:
        raise CheckpointError(
            f"AV {info.path}: its nla_config.json states a prompt of {len(prompting.prompt_ids or ())} tokens (actor_prompt_ids) "
            f"and one of {len(ids_of_text)} (actor_prompt_rendered), which differ. {DRIFT}"
        )
    stated = ids_of_text if prompting.prompt_ids is None else list(prompting.prompt_ids)
    begun = tokenizer.encode(prompting.prefill, add_special_tokens=False) if prompting.prefill else []
    for rendered in (ids, *(_chat_ids(info, tokenizer, message, enable_thinking=value) for value in (False, True))):
        if stated in (rendered, [*rendered, *begun]):
            return rendered
    first = next((i for i, (a, b) in enumerate(zip(stated, ids, strict=False)) if a != b), min(len(stated), len(ids)))
    raise CheckpointError(
        f"AV {info.path}: its nla_config.json states a prompt of {len(stated)} tokens, and the chat template renders {len(ids)} "
        f"tokens, which differ from token {first} on, with thinking on, off or by default. {DRIFT}"
    )


def _marker_id(info: CheckpointInfo, tokenizer: Any) -> int:
    """Return the token id of the marker, once it is one token, and the one that the sidecar states."""
    prompting = info.av_prompting
    ids: list[int] = tokenizer.encode(prompting.marker, add_special_tokens=False)
    expected = ids[:1] if prompting.marker_id is None else [prompting.marker_id]
    if ids != expected or len(ids) != 1 or ids == [tokenizer.unk_token_id]:
        unknown = ", the unknown token" if ids == [tokenizer.unk_token_id] else ""
        if prompting.marker_id is None:
            raise CheckpointError(
                f"AV {info.path}: the marker {prompting.marker!r} is tokenized as {ids}{unknown}; expected one token. Choose "
                "another autoencoder.prompting.marker: the one that the AV was trained with."
            )
        raise CheckpointError(
            f"AV {info.path}: the marker {prompting.marker!r} is tokenized as {ids}{unknown}; the sidecar says "
            f"injection_token_id={prompting.marker_id}. {DRIFT}"
        )
    return ids[0]


def _check_chat_arguments(info: CheckpointInfo, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Raise CheckpointError for an argument that the chat template does not use, which would silently change nothing."""
    own = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
    for name in arguments:
        if name in own or not re.search(rf"\b{re.escape(name)}\b", default_template(tokenizer.chat_template)):
            raise CheckpointError(
                f"AV {info.path}: autoencoder.prompting.chat_arguments has {name!r}, which is no argument of its chat template. "
                "Leave it out, or check the spelling."
            )


def _marker_position(info: CheckpointInfo, ids: Sequence[int], marker_id: int) -> int:
    """Return the index of the marker in the prompt; its neighbours are compared with the ids that the sidecar states."""
    prompting = info.av_prompting
    positions = [i for i, token in enumerate(ids) if token == marker_id]
    if len(positions) != 1 or not 0 < positions[0] < len(ids) - 1:
        raise CheckpointError(
            f"AV {info.path}: the marker {prompting.marker!r} is at positions {positions} of the {len(ids)} prompt tokens, "
            "expected exactly one position, neither the first nor the last. Use the chat template and prompt template that were "
            "released with the checkpoint."
        )
    [position] = positions
    neighbours, stated = (ids[position - 1], ids[position + 1]), (prompting.left_id, prompting.right_id)
    if any(expected not in (None, actual) for expected, actual in zip(stated, neighbours, strict=True)):
        raise CheckpointError(
            f"AV {info.path}: the marker is between the tokens {neighbours[0]} and {neighbours[1]}; the sidecar says "
            f"{stated[0]} and {stated[1]}. {DRIFT}"
        )
    return position


def stop_token_ids(info: CheckpointInfo, tokenizer: Any) -> frozenset[int]:
    """Return the ids of the prompting's stop tokens.

    By default these are the end-of-sequence ids of tokenizer, config.json and generation_config.json, which alone has Gemma's
    <end_of_turn>. Nothing else in generation_config.json is used: its temperature, top_k and repetition penalty are the base
    model's defaults.
    """
    if (stated := info.av_prompting.stop_tokens) is not None:
        return frozenset(_single_id(info, tokenizer, text) for text in stated)
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


def _single_id(info: CheckpointInfo, tokenizer: Any, text: str) -> int:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids == [tokenizer.unk_token_id]:
        raise CheckpointError(
            f"AV {info.path}: autoencoder.prompting.stop_tokens has {text!r}, which its tokenizer makes {len(ids)} tokens of "
            f"({ids}); a stop token must be one known token."
        )
    return ids[0]


def _common_prefix(rows: Sequence[Sequence[int]], num_left: int) -> tuple[int, ...]:
    """Return the longest common prefix of all rows that leaves at least `num_left` tokens of each."""
    shortest = min(map(len, rows))
    equal = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    return tuple(rows[0][: max(0, min(equal, shortest - num_left))])


class ArPrompts:
    """The AR's prompts: turns explanations into token ids and checks each of them."""

    def __init__(self, info: CheckpointInfo, tokenizer: Any, num_embeddings: int) -> None:
        """Prepare the template's text around an explanation, and check the tokenizer on two probe texts.

        Raises:
            CheckpointError: BOS is missing, a special token is appended, or the last tokens are not the sidecar's suffix.
        """
        self._info, self._tokenizer, self._num_embeddings = info, tokenizer, num_embeddings
        self._before, self._after = info.ar_prompting.affixes
        self._limit: int | None = info.config.get("max_position_embeddings")
        self._before = one_bos(self._before, tokenizer)
        self._bos = _document_bos(info, tokenizer)
        first = tokenizer.encode(f"{self._before}x{self._after}", add_special_tokens=False)[:1]
        # A template that begins with BOS gets no second one.
        self._adds_special = info.ar_prompting.special_tokens and (self._bos is None or first != [self._bos])
        self._num_read = -info.ar_prompting.readout
        self._marker_id = self._known_marker()
        self.common = _common_prefix(self.ids(["A", "zebra", "1", ""], check_suffix=False), self._num_read)
        """Tokens that most prompts begin with. A text may merge with the last of them, so each prompt must be compared."""
        if self._marker_id is not None and self._marker_id in self.common:
            raise CheckpointError(
                f"AR {info.path}: its marker {info.ar_prompting.marker!r} stands before the text, so every text would be read "
                "alike. Use the released template, with {injection_char} behind {explanation}."
            )
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

    def read_position(self, row: Sequence[int]) -> int:
        """Return the index of the token that the AR is read at."""
        return len(row) - self._num_read if self._marker_id is None else row.index(self._marker_id)

    def _known_marker(self) -> int | None:
        """Return the id of the token that the AR is read at, once it is the one that the sidecar states; None if there is
        none."""
        prompting = self._info.ar_prompting
        if prompting.marker is None:
            return None
        ids = self._tokenizer.encode(prompting.marker, add_special_tokens=False)
        if len(ids) != 1 or ids[0] not in (prompting.marker_id, *(ids if prompting.marker_id is None else ())):
            raise CheckpointError(
                f"AR {self._info.path}: the marker {prompting.marker!r} is tokenized as {ids}; the sidecar says "
                f"injection_token_id={prompting.marker_id}. {DRIFT}"
            )
        return int(ids[0])

    def _check_size(self, text: str, row: list[int]) -> None:
        longest = self._info.ar_prompting.longest
        if longest is not None and len(row) > longest:
            raise DataError(
                f"an explanation of {len(text)} characters ({text[:60]!r}...) makes an AR prompt of {len(row)} tokens; AR "
                f"{self._info.path} was trained on {longest} at most, and cutting the prompt would remove the marker that it "
                "is read at. Lower sampling.max_new_tokens."
            )
        if self._marker_id is not None and self._marker_id not in row:
            raise CheckpointError(
                f"AR {self._info.path}: the prompt of {text[:60]!r} does not hold its marker "
                f"{self._info.ar_prompting.marker!r} as a token of its own, so there is no place to read it at. {DRIFT}"
            )
        if self._limit is not None and len(row) > self._limit:
            raise DataError(
                f"an explanation of {len(text)} characters ({text[:60]!r}...) makes an AR prompt of {len(row)} tokens; AR "
                f"{self._info.path} takes {self._limit} at most, and truncation would remove the token that it is read at. Lower "
                "sampling.max_new_tokens."
            )
        if len(row) < self._num_read:
            raise CheckpointError(
                f"AR {self._info.path}: autoencoder.prompting.ar_readout={-self._num_read}, but the prompt of {text[:60]!r} has "
                f"only {len(row)} tokens. Read it nearer to its end."
            )
        if max(row) >= self._num_embeddings:
            raise CheckpointError(
                f"AR {self._info.path}: its tokenizer gives token {max(row)}, but the model has {self._num_embeddings} rows. "
                f"{DRIFT}"
            )

    def _check_suffix(self, text: str, row: list[int]) -> None:
        expected = self._info.ar_prompting.suffix_ids
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
    prompting = info.av_prompting
    message = prompting.message.partition(prompting.marker)[2].strip()
    tag = opened_answer_tag(after_marker.rpartition(message)[2] if message else after_marker)
    if tag and not (prompting.opening_tag == "" and tag in ENCLOSING_TAGS):
        remedy = (
            "Explanations would be missed: say that answers begin inside the tag (autoencoder.prompting.opening_tag='')"
            if tag in ENCLOSING_TAGS
            else "Thoughts would be taken for explanations: render it with thinking off, if the AV was trained so "
            "(autoencoder.prompting.chat_arguments={enable_thinking: false}), or with the answer begun (prefill)"
        )
        raise CheckpointError(
            f"AV {info.path}: its chat template ends the prompt with the open tag {tag}, so the answer begins inside that tag. "
            f"{remedy}."
        )


def _chat_ids(info: CheckpointInfo, tokenizer: Any, messages: list[dict[str, str]], **arguments: Any) -> list[int]:
    if not (template := default_template(tokenizer.chat_template)):
        raise CheckpointError(
            f"AV {info.path}: its tokenizer has no chat template to build the prompt with. Add the released chat_template.jinja."
        )
    fixed = {"chat_template": dated(template, info.tokenizer)}
    # By default transformers 5 returns a BatchEncoding, and iterating over that yields its keys.
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False, **(fixed | arguments)
    )
    return ids


def _check_chat_bos(info: CheckpointInfo, tokenizer: Any, ids: list[int]) -> None:
    bos, writes_bos = tokenizer.bos_token_id, "bos_token" in default_template(tokenizer.chat_template)
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
