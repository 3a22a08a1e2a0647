"""The families of texts that somebody already has, and of what reads them: an AR, or the encoder of a talkative autoencoder.

There is no AV. The texts of a file (`texts_file.py`) stand in place of its draws; everything after that is as for drawn ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.base import ActivationFacts, CutText, Family
from ksweep.autoencoder.nla.checkpoint import CheckpointInfo, base_notes
from ksweep.autoencoder.nla.family import stated_training_norm
from ksweep.autoencoder.own_parts import OwnPart, ar_half_identity, check_half, half_of, load_ar_half, scoring_kind_of
from ksweep.autoencoder.tae.family import TaeFile
from ksweep.autoencoder.texts_file import TextsFile, read_texts_file
from ksweep.config.spec import Autoencoder, Sampling
from ksweep.stats.fve import ScoringKind
from ksweep.utils import hub
from ksweep.utils.errors import SpecError
from ksweep.utils.notes import Note, notes_of
from ksweep.utils.safetensors_header import bytes_of_weights

if TYPE_CHECKING:
    import numpy as np

    from ksweep.autoencoder.base import Reconstructor, Verbalizer

WORDS = "words"
"""Stands for a tokenizer where an AR of the user's own reads the texts."""
TEXTS_AT_ONCE = 1000


class GivenTexts(Family):
    """Texts of a file, cut to the number of tokens that the spec allows."""

    source_field = "autoencoder.texts"
    draws_are_given = True

    @property
    def short_name(self) -> str:
        """The name of the file without its suffix."""
        return Path(self.autoencoder.texts or "").stem

    @property
    def given_texts(self) -> TextsFile:
        """The file of texts."""
        return read_texts_file(self.autoencoder.texts or "", self.autoencoder.texts_column)

    def resolve_sampling(self, sampling: Sampling) -> Sampling:
        """Return the settings with the number of texts that are taken of each activation.

        The default takes as many as every activation of the file has.
        """
        default, texts = Sampling(), self.given_texts
        others = [f.name for f in fields(Sampling) if getattr(sampling, f.name) != getattr(default, f.name)]
        if stated := [name for name in others if name != "num_draws"]:
            raise SpecError(
                f"sampling.{stated[0]}={getattr(sampling, stated[0])!r} is for the draws of an AV, and the texts of {texts.path} "
                f"are given: leave it out, or at its default ({getattr(default, stated[0])!r})"
            )
        if not others:
            return replace(sampling, num_draws=texts.fewest)
        if sampling.num_draws > texts.most:
            raise SpecError(
                f"sampling.num_draws={sampling.num_draws}, but no activation of {texts.path} has more than {texts.most} texts: "
                f"set sampling.num_draws={texts.most}, or leave it out"
            )
        return sampling

    def draws_identity(self) -> dict[str, Any]:
        """Return the digest of the texts, and how they are cut and counted."""
        spec = self.autoencoder
        cut = {} if spec.max_text_tokens is None else {"max_text_tokens": spec.max_text_tokens, "kept_tokens": spec.kept_tokens}
        return {"texts": self.given_texts.digest, "tokenizer": self.tokenizer_digest()} | cut

    def tokenizer_digest(self) -> str:
        """Return the digest of the tokenizer that counts and cuts."""
        return WORDS if self.tokenizer_directory is None else digest_of_tokenizer(self.tokenizer_directory)

    @property
    @abstractmethod
    def tokenizer_directory(self) -> Path | None:
        """Directory of the tokenizer that counts and cuts; None where words are counted."""

    @abstractmethod
    def load_tokenizer(self) -> Any:
        """Load the tokenizer that counts and cuts."""

    def cut_texts(self, texts: Sequence[str]) -> list[CutText]:
        """Return texts without blanks around them, and with the tokens that the spec keeps."""
        limit, first = self.autoencoder.max_text_tokens, self.autoencoder.kept_tokens == "first"
        if self.tokenizer_directory is None:
            return [_cut_words(text.split(), text.strip(), limit, first) for text in texts]
        return list(cut_by_tokens(self.load_tokenizer(), texts, limit, first))

    def load_verbalizer(self, devices: Sequence[str]) -> Verbalizer:
        """There is none."""
        raise AssertionError("given texts are never drawn")


class TextsForAr(GivenTexts):
    """Given texts, and the AR of an NLA pair or of the user's own that reads them."""

    @staticmethod
    def claims(spec: Autoencoder) -> bool:
        """Return whether the spec names texts and an AR."""
        return spec.texts is not None and spec.ar is not None

    @cached_property
    def ar(self) -> OwnPart | CheckpointInfo:
        """The AR: the user's own, or an inspected checkpoint."""
        if stated := self.autoencoder.prompting.of_av:
            raise SpecError(f"autoencoder.prompting.{next(iter(stated))} is for an AV, and the texts are given: leave it out")
        if option := self.autoencoder.without_effect("av_stack"):
            raise SpecError(f"{option} is for an AV, and the texts are given: leave it out")
        return half_of(self.autoencoder, "ar")

    @property
    def space(self) -> str | None:
        """Name and digest of the whitening that a checkpoint's AR was trained on; None for raw activations."""
        return self.ar.space if isinstance(self.ar, CheckpointInfo) else None

    def transform(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return the whitening."""
        assert isinstance(self.ar, CheckpointInfo)
        return self.ar.read_whitening().apply

    @property
    def scoring_kind(self) -> ScoringKind:
        """What the user's AR states; a checkpoint's AR is scored by direction."""
        return scoring_kind_of(self.ar)

    @property
    def layer(self) -> int | None:
        """Layer of the AR."""
        return self.ar.layer

    @property
    def notes(self) -> tuple[Note, ...]:
        """Notes of a checkpoint's sidecar and prompt."""
        return notes_of(self.ar)

    def scores_identity(self) -> dict[str, Any]:
        """Return digest and name of the user's AR, or the identity of the checkpoint."""
        return ar_half_identity(self.ar, self.autoencoder)

    def check_activations(self, facts: ActivationFacts) -> tuple[Note, ...]:
        """Check layer and width; another base model is noted."""
        check_half(self.ar, self.autoencoder.ar or "", facts)
        if facts.model is None or isinstance(self.ar, OwnPart):
            return ()
        return base_notes(facts.model, self.ar.sidecar.base_checkpoint, "the AR")

    def training_norm(self) -> float | None:
        """Return the norm that a checkpoint states."""
        return None if isinstance(self.ar, OwnPart) else stated_training_norm(self.ar)

    def weight_bytes(self) -> int:
        """Return the size of the AR's weights."""
        if isinstance(self.ar, OwnPart):
            return self.ar.number("weight_bytes") or 0
        return bytes_of_weights(self.ar.weights, self.autoencoder.reconstructor_dtype, self.ar.num_layers)

    def half_bytes(self) -> tuple[int, int]:
        """Return the size of the AR's weights: there is no AV."""
        return 0, self.weight_bytes()

    @property
    def tokenizer_directory(self) -> Path | None:
        """That of the AR; None for the user's own."""
        return None if isinstance(self.ar, OwnPart) else self.ar.tokenizer

    def load_tokenizer(self) -> Any:
        """Load the AR's tokenizer."""
        from ksweep.autoencoder.nla.loading import load_nla_tokenizer

        assert isinstance(self.ar, CheckpointInfo)
        return load_nla_tokenizer(self.ar)

    def cut_texts(self, texts: Sequence[str]) -> list[CutText]:
        """Return the texts cut; their tokens are left out, as an AR reads text."""
        return [replace(text, token_ids=()) for text in super().cut_texts(texts)]

    def load_reconstructor(self, devices: Sequence[str], verbalizer: Verbalizer | None = None) -> Reconstructor:
        """Make the user's AR, or load the checkpoint."""
        return load_ar_half(self.ar, self.autoencoder, devices)


class TextsForEncoder(GivenTexts, TaeFile):
    """Given texts, and the encoder of a talkative autoencoder that reads their tokens."""

    source_field = "autoencoder.texts"

    @staticmethod
    def claims(spec: Autoencoder) -> bool:
        """Return whether the spec names texts and a checkpoint."""
        return spec.texts is not None and spec.checkpoint is not None

    @property
    def num_tokens(self) -> None:
        """Given texts have their own lengths."""
        return None

    @property
    def tokenizer_directory(self) -> Path:
        """That of the base model."""
        return self.info.base

    def load_tokenizer(self) -> Any:
        """Load the base model's tokenizer."""
        from ksweep.autoencoder.tae.base_model import load_base_tokenizer

        return load_base_tokenizer(self.info.base)

    def weight_bytes(self) -> int:
        """Return the size of the encoder's weights."""
        return bytes_of_weights(self.info.base, self.autoencoder.reconstructor_dtype)

    def half_bytes(self) -> tuple[int, int]:
        """Return the size of the encoder's weights: there is no AV."""
        return 0, self.weight_bytes()


def digest_of_tokenizer(directory: Path) -> str:
    """Return a digest of a tokenizer alone, so that two ARs with the same one count the same texts."""
    file = directory / "tokenizer.json"
    return hub.content_digest(file if file.is_file() else directory)


def cut_by_tokens(tokenizer: Any, texts: Sequence[str], limit: int | None, first: bool) -> Iterator[CutText]:
    """Yield the first (or last) `limit` tokens of each text as text; None keeps all.

    A text is cut between two tokens and not decoded from them, so what is left stands in the text as it is. A character of
    several tokens is kept whole or not at all.
    """
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        stripped = [text.strip() for text in texts[start : start + TEXTS_AT_ONCE]]
        encoded = tokenizer(stripped, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        offsets = encoded["offset_mapping"] if tokenizer.is_fast else [None] * len(stripped)
        for text, ids, spans in zip(stripped, encoded["input_ids"], offsets, strict=True):
            if limit is None or len(ids) <= limit:
                yield CutText(text, len(ids), tuple(ids))
                continue
            kept = ids[:limit] if first else ids[-limit:]
            if spans is None:
                left = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
            elif first:
                left = text[: min(spans[limit - 1][1], spans[limit][0])]
            else:
                left = text[max(spans[-limit][0], spans[-limit - 1][1]) :]
            yield CutText(left.strip(), limit, tuple(kept))


def _cut_words(words: Sequence[str], text: str, limit: int | None, first: bool) -> CutText:
    if limit is None or len(words) <= limit:
        return CutText(text, len(words))
    return CutText(" ".join(words[:limit] if first else words[-limit:]), limit)
