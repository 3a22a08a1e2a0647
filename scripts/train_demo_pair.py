"""Rebuild the demo pair in `ksweep/demo/` from nothing: how well can a small AV/AR pair on SmolLM2-135M do on two CPU cores?

    python scripts/train_demo_pair.py                 # all stages, about 80 minutes on two cores; continues where it stopped
    python scripts/train_demo_pair.py --minutes 8     # the same, every training stage shortened in proportion

Stages, each leaving one file in the work directory and skipped when that file is there:

    texts      books and articles -> training passages and held-out passages
    vectors    block-20 activations of both, 6 positions a passage
    av-0       AV learns to say the last 5 to 10 tokens of text up to the position
    samples-0  AV draws at temperatures 0.5, 0.7, 1.0 for vectors it was not trained on
    ar-0       AR learns to reconstruct the vector from those draws and from the true text
    av-1, ...  AV learns the best of 8 of its own draws, as the AR scores them; then the AR again
    report     FVE against K and temperature on the held-out passages; export into ksweep/demo
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _demo import pair, texts
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("KSWEEP_HOME", "~/.cache/ksweep")).expanduser()
CONTEXT = 16
"""Tokens kept before and at each position: enough for the longest target and for moving its start to a word."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the committed pair was trained with."""

    num_passages: int = 5000
    positions_per_passage: int = 6
    min_position: int = 24
    target_tokens: tuple[int, int] = (5, 10)
    av_minutes: float = 30.0
    av_batch: int = 64
    av_rate: float = 1.5e-3
    seed: int = 0


# ---- stage: texts


def prepare_texts(work: Path, base: Path, settings: Settings) -> None:
    tokenizer = pair.load_tokenizer(base)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    documents = texts.load_documents(work / "downloads")
    training = texts.training_passages(documents, count_tokens, settings.num_passages, settings.seed)
    held_out = texts.held_out_passages(documents, count_tokens, per_document=6, seed=settings.seed)
    write_lines(work / "held_out.jsonl", [json.dumps(row, ensure_ascii=False) for row in held_out])
    write_lines(work / "training.jsonl", [json.dumps({"text": text}, ensure_ascii=False) for text in training])
    say(f"{len(training)} training passages, {len(held_out)} held-out passages")


def write_lines(path: Path, lines: list[str]) -> None:
    part = path.with_suffix(".part")
    part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    part.replace(path)


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


# ---- stage: vectors


@torch.inference_mode()
def extract(base: Path, passages: list[str], settings: Settings, per_passage: int) -> dict[str, np.ndarray]:
    """`vector` [row, width], `context` [row, CONTEXT] token ids up to and at the position, `passage` [row]."""
    tokenizer, model = pair.load_tokenizer(base), pair.load_truncated(base)
    rng = np.random.default_rng(settings.seed)
    ids = [tokenizer(text).input_ids for text in passages]
    rows: dict[str, list[Any]] = {"vector": [], "context": [], "passage": [], "position": []}
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(ids), 32):
        chunk = by_length[start : start + 32]
        width = max(len(ids[i]) for i in chunk)
        batch = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in chunk])
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state.float().numpy()
        for row, i in enumerate(chunk):
            for position in sorted(rng.choice(np.arange(settings.min_position, len(ids[i])), per_passage, replace=False)):
                rows["vector"].append(hidden[row, position].astype(np.float32))
                rows["context"].append(ids[i][position - CONTEXT + 1 : position + 1])
                rows["passage"].append(i)
                rows["position"].append(position)
        if start % 640 == 0:
            say(f"extracted {start + len(chunk)} of {len(ids)} passages")
    return {key: np.array(value) for key, value in rows.items()}


def prepare_vectors(work: Path, base: Path, settings: Settings) -> None:
    held_out = extract(base, read_texts(work / "held_out.jsonl"), settings, per_passage=1)
    training = extract(base, read_texts(work / "training.jsonl"), settings, settings.positions_per_passage)
    save_arrays(work / "held_out.npz", held_out)
    save_arrays(work / "vectors.npz", training)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)


def say(message: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(time.strftime("%H:%M:%S"), message, flush=True)


# ---- stage: av


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Activations with their targets; every target is a right-aligned run of `length` tokens of `context`."""

    vector: Tensor
    context: np.ndarray
    length: np.ndarray


def targets(context: np.ndarray, word_starts: np.ndarray, shortest: int, longest: int, seed: int) -> np.ndarray:
    """Number of last tokens to say, per row: uniform, then lengthened until the first one starts a word."""
    length = np.random.default_rng(seed).integers(shortest, longest + 1, len(context))
    for _ in range(CONTEXT):
        inside = ~word_starts[context[np.arange(len(context)), CONTEXT - length]] & (length < CONTEXT)
        length = length + inside
    return length


def word_starts(base: Path) -> np.ndarray:
    tokenizer = pair.load_tokenizer(base)
    return np.array([tokenizer.convert_ids_to_tokens(i).startswith("Ġ") for i in range(len(tokenizer))])


def load_rows(path: Path, base: Path, settings: Settings) -> Rows:
    data = np.load(path)
    length = targets(data["context"], word_starts(base), *settings.target_tokens, settings.seed)
    return Rows(vector=torch.from_numpy(data["vector"]), context=data["context"], length=length)


def chosen_texts(rows: Rows, batch: np.ndarray) -> Tensor:
    return torch.from_numpy(rows.context[batch, CONTEXT - rows.length[batch[0]] :]).long()


def train_av(
    base: Path, start: Path | None, rows: Rows, held_out: Rows, out: Path, *,
    minutes: float, steps: int | None, settings: Settings, rate: float,
) -> dict[str, Any]:
    """Supervised training of the AV's LoRA on `rows`; the adapter and a log end up in `out`."""
    prompt = pair.Prompt.of(pair.load_tokenizer(base))
    model = pair.with_fast_lora(pair.with_lora(pair.load_base(base), start))
    av = model.base_model.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainer = pair.Trainer(parameters, [rate] * len(parameters))
    clock = Clock(minutes, steps, out.with_suffix(".checkpoint"), trainer)
    rng = np.random.default_rng([settings.seed, dist.get_rank(), clock.step])
    mine = np.arange(dist.get_rank(), len(rows.length), dist.get_world_size())
    stream = pair.batches_of_one_length(rows.length[mine], settings.av_batch // dist.get_world_size(), rng)
    recent: list[tuple[float, float]] = []
    while clock.progress < 1.0:
        batch = mine[next(stream)]
        loss, per_token = pair.av_loss(
            av, prompt, rows.vector[batch], chosen_texts(rows, batch), whole=clock.step % 6 == 0
        )
        loss.backward()
        clock.tick()
        recent.append((float(per_token[:-1].mean()), float(per_token[-2])))
        if clock.step % 10 == 0:
            text, last = np.mean(recent[-20:], axis=0)
            say(f"{out.name} step {clock.step} ({clock.progress:.0%}): loss per text token {text:.2f}, last token {last:.2f}")
        if clock.step % 150 == 0:
            say(f"{out.name} step {clock.step} held out: {av_held_out(av, prompt, held_out)}")
    reached = {"steps": clock.step, "examples": clock.step * settings.av_batch, "minutes": round(clock.spent / 60, 1)}
    reached |= {"held_out_loss": av_held_out(av, prompt, held_out)}
    save_in_place(out, lambda into: pair.save_adapter(model, into, pair.sidecar("av", prompt, digest(base), reached)))
    clock.forget()
    return reached


@torch.inference_mode()
def av_held_out(av: torch.nn.Module, prompt: pair.Prompt, rows: Rows) -> dict[str, float]:
    """Loss per text token with the right vectors, of the last token, and with vectors shuffled among rows."""
    sums: dict[str, list[float]] = {"text": [], "last_token": [], "shuffled": []}
    for length in np.unique(rows.length):
        batch = np.flatnonzero(rows.length == length)
        if len(batch) < 2:
            continue
        _, own = pair.av_loss(av, prompt, rows.vector[batch], chosen_texts(rows, batch), whole=False)
        _, other = pair.av_loss(av, prompt, rows.vector[np.roll(batch, 1)], chosen_texts(rows, batch), whole=False)
        sums["text"] += [float(own[:-1].mean())] * len(batch)
        sums["last_token"] += [float(own[-2])] * len(batch)
        sums["shuffled"] += [float(other[:-1].mean())] * len(batch)
    return {key: round(float(np.mean(value)), 3) for key, value in sums.items()}


# ---- training in minutes, resumable


class Clock:
    """Steps and progress of one training, by time or by number of steps; a checkpoint every three minutes to continue from."""

    def __init__(self, minutes: float, steps: int | None, checkpoint: Path, trainer: pair.Trainer) -> None:
        self.seconds, self.steps, self.checkpoint, self.trainer = minutes * 60, steps, checkpoint, trainer
        self.step, self.spent, self.progress = 0, 0.0, 0.0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            trainer.restore(state["trainer"])
            self.step, self.spent, self.progress = state["step"], state["spent"], state["progress"]
            say(f"continuing {checkpoint.name} at step {self.step}")
        self.last = self.saved = time.monotonic()

    def tick(self) -> None:
        """Apply the gradients and count the step."""
        now = time.monotonic()
        self.step, self.spent, self.last = self.step + 1, self.spent + now - self.last, now
        self.progress = self.trainer.step(min(1.0, self.step / self.steps if self.steps else self.spent / self.seconds))
        if now - self.saved > 180:
            self.saved = now
            if dist.get_rank() == 0:
                part = self.checkpoint.with_suffix(".part")
                state = {"step": self.step, "spent": self.spent, "progress": self.progress}
                torch.save({"trainer": self.trainer.state(), **state}, part)
                part.replace(self.checkpoint)

    def forget(self) -> None:
        if dist.get_rank() == 0:
            self.checkpoint.unlink(missing_ok=True)
        dist.barrier()


def save_in_place(out: Path, write: Any) -> None:
    """A directory appears whole: written beside its place, then renamed into it."""
    if dist.get_rank() == 0:
        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    dist.barrier()


def digest(base: Path) -> str:
    return pair.digest_of(base / "model.safetensors")
