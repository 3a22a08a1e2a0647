"""Rebuild the demo pair in `ksweep/demo/` from nothing: how well can a small AV/AR pair on SmolLM2-135M do on two CPU cores?

    python scripts/train_demo_pair.py                 # all stages, about 65 minutes on two cores; continues where it stopped
    python scripts/train_demo_pair.py --minutes 8     # every training stage shortened in proportion (42 is the full length)
    python scripts/train_demo_pair.py --rounds 1      # plus one round of the AV on the best of its own draws
    python scripts/train_demo_pair.py --av ksweep/demo/av --passages 400 --vectors 900 --steps 60 --save-at 0,4,8,15,30,60
                                                      # the AR alone, for an AV that is there already, kept at six stages; with
                                                      # --no-report without the held-out FVE, and nothing in --out

Stages; each writes one file in the work directory and is skipped if that file exists:

    texts      books and articles -> training passages and held-out passages
    vectors    block-20 activations of both, 6 positions per passage
    av-0       AV learns to say the last 5 to 10 tokens of text up to the position
    samples-0  AV draws at temperatures 0.4 and 0.8 for vectors it was not trained on
    ar-0       AR learns to reconstruct the vector from those draws and from the true text
    av-1, ...  AV learns (--rounds) the best of 6 of its own draws, as the AR scores them; then the AR again
    report     FVE against K and temperature on the held-out passages; export into ksweep/demo

With --save-at, AV and AR are also kept as they were after these steps, in iter_0000020/av and iter_0000020/ar below `series` in
the work directory: `autoencoder.ar='.../series/iter_*/ar'` makes them an axis.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _demo import pair, texts
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("KSWEEP_HOME", "~/.cache/ksweep")).expanduser()
DEFAULT_MINUTES = 42.0
CONTEXT = 16
"""Tokens kept before and at each position: enough for the longest target and for moving its start to a word."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of the committed pair.

    Its AV trained for 36 minutes in two parts (24 and 12, the second at rate 1.2e-3), 24,704 examples on two busy cores. In the
    first part the two workers started from different random adapters, which `Trainer` now prevents: expect the same or better.
    """

    num_passages: int = 5000
    positions_per_passage: int = 6
    min_position: int = 24
    target_tokens: tuple[int, int] = (5, 10)
    num_av_passages: int = 4200
    """Passages for the AV; the AR learns from draws for the passages after them."""
    av_minutes: float = 36.0
    av_batch: int = 32
    av_rate: float = 1.5e-3
    num_sampled: int = 2400
    temperatures: tuple[float, ...] = (0.4, 0.8)
    ar_batch: int = 64
    ar_minutes: float = 6.0
    ar_rate: float = 1e-3
    num_round: int = 2000
    """Vectors in a round on the AV's own draws (`--rounds`); the committed pair went without."""
    round_draws: int = 6
    round_minutes: float = 6.0
    num_evaluated: int = 200
    report_temperatures: tuple[float, ...] = (0.3, 0.7, 1.0, 0.5, 1.3)
    max_new_tokens: int = 32
    save_at: tuple[int, ...] = ()
    """Steps of every training after which its state is kept as well."""
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
    """Return `vector` [row, width], `context` [row, CONTEXT] (tokens up to the position), `passage` and `position` [row]."""
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
    """Return the number of last tokens to say for each row: uniform, then increased until the first one starts a word."""
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
    base: Path,
    start: Path | None,
    rows: Rows,
    held_out: Rows,
    out: Path,
    *,
    minutes: float,
    steps: int | None,
    settings: Settings,
    rate: float,
) -> dict[str, Any]:
    """Train the AV's LoRA on `rows` (supervised), and write the adapter to `out`."""
    prompt = pair.Prompt.of(pair.load_tokenizer(base))
    model = pair.with_fast_lora(pair.with_lora(pair.load_base(base), start))
    av = model.base_model.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainer = pair.Trainer(parameters, [rate] * len(parameters))
    clock = Clock(minutes, steps, out.with_suffix(".checkpoint"), trainer)

    def save_stage(into: Path) -> None:
        pair.save_adapter(model, into, pair.sidecar("av", prompt, digest(base), clock.reached(settings.av_batch)))
        pair.load_tokenizer(base).save_pretrained(into)  # with the chat template of the demo

    save_if_asked(clock, settings, out.parent / "series", "av", save_stage)
    rng = np.random.default_rng([settings.seed, dist.get_rank(), clock.step])
    mine = np.arange(dist.get_rank(), len(rows.length), dist.get_world_size())
    stream = pair.batches_of_one_length(rows.length[mine], settings.av_batch // dist.get_world_size(), rng)
    recent: list[tuple[float, float]] = []
    while clock.progress < 1.0:
        batch = mine[next(stream)]
        loss, per_token = pair.av_loss(av, prompt, rows.vector[batch], chosen_texts(rows, batch), whole=clock.step % 6 == 0)
        loss.backward()
        clock.tick()
        save_if_asked(clock, settings, out.parent / "series", "av", save_stage)
        recent.append((float(per_token[:-1].mean()), float(per_token[-2])))
        if clock.step % 10 == 0:
            text, last = np.mean(recent[-20:], axis=0)
            say(f"{out.name} step {clock.step} ({clock.progress:.0%}): loss per text token {text:.2f}, last token {last:.2f}")
        if clock.step % 150 == 0:
            say(f"{out.name} step {clock.step} held out: {av_held_out(av, prompt, held_out)}")
    reached = clock.reached(settings.av_batch) | {"held_out_loss": av_held_out(av, prompt, held_out)}
    save_in_place(out, lambda into: pair.save_adapter(model, into, pair.sidecar("av", prompt, digest(base), reached)))
    clock.forget()
    return reached


@torch.inference_mode()
def av_held_out(av: torch.nn.Module, prompt: pair.Prompt, rows: Rows) -> dict[str, float]:
    """Return the loss per text token, of the last token, and per text token with vectors shuffled among rows."""
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
    """Step count and progress of one training, by time or by number of steps, with a checkpoint every three minutes."""

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

    def reached(self, batch: int) -> dict[str, Any]:
        """Return how far the training has come, for the sidecar."""
        return {"steps": self.step, "examples": self.step * batch, "minutes": round(self.spent / 60, 1)}

    def forget(self) -> None:
        if dist.get_rank() == 0:
            self.checkpoint.unlink(missing_ok=True)
        dist.barrier()


def save_if_asked(clock: Clock, settings: Settings, series: Path, role: str, write: Callable[[Path], None]) -> None:
    """Keep the AV or AR as it is now, in `series`/iter_0000020/`role`, if this step is one of `settings.save_at`."""
    if clock.step in settings.save_at:
        out = series / f"iter_{clock.step:07d}" / role
        out.parent.mkdir(parents=True, exist_ok=True)
        save_in_place(out, write)


def save_in_place(out: Path, write: Any) -> None:
    """Write a directory under another name, then rename it, so that it is never seen incomplete."""
    if dist.get_rank() == 0:
        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    dist.barrier()


def digest(base: Path) -> str:
    return pair.digest_of(base / "model.safetensors")


# ---- stage: samples


def draw_texts(
    base: Path,
    av_adapter: Path,
    vectors: Tensor,
    *,
    temperature: float,
    num_draws: int,
    seed: int,
    rows_at_once: int = 96,
) -> list[list[list[int]]]:
    """Return token ids between the tags, [vector][draw]; empty for draws that do not end. The workers share the vectors."""
    prompt = pair.Prompt.of(pair.load_tokenizer(base))
    av = pair.with_lora(pair.load_base(base), av_adapter).eval().base_model.model
    rank, workers = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    mine: list[list[list[int]]] = []
    per_chunk = max(1, rows_at_once // num_draws)
    own = vectors[rank::workers]
    for start in range(0, len(own), per_chunk):
        found = pair.draw(
            av,
            prompt,
            own[start : start + per_chunk],
            num_draws=num_draws,
            temperature=temperature,
            max_new_tokens=CONTEXT + 4,
            generator=generator,
            only_text=True,
        )
        found = [draw[:-1] if draw[-1] == prompt.closing[0] else [] for draw in found]
        mine += [found[i : i + num_draws] for i in range(0, len(found), num_draws)]
        if start // per_chunk % 10 == 0:
            say(f"drawn {start + per_chunk} of {len(own)} vectors at temperature {temperature}")
    return interleaved(mine, len(vectors))


def interleaved(mine: list[Any], total: int) -> list[Any]:
    """Merge the results of all workers, of which worker r has items r, r + workers, ..., into one list on every worker."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    whole: list[Any] = [None] * total
    for rank, part in enumerate(gathered):
        whole[rank :: len(gathered)] = part
    return whole


def write_samples(base: Path, av_adapter: Path, rows: Rows, out: Path, temperatures: tuple[float, ...], seed: int) -> None:
    """Write one draw per vector and temperature, and the true text, as lines {"row", "text", "temperature"}."""
    tokenizer = pair.load_tokenizer(base)
    lines = []
    for number, temperature in enumerate(temperatures):
        found = draw_texts(base, av_adapter, rows.vector, temperature=temperature, num_draws=1, seed=seed + number)
        for row, (tokens,) in enumerate(found):
            if text := tokenizer.decode(tokens).strip():
                lines.append({"row": row, "text": text, "temperature": temperature})
    for row, (context, length) in enumerate(zip(rows.context, rows.length, strict=True)):
        lines.append({"row": row, "text": tokenizer.decode(context[CONTEXT - length :]).strip(), "temperature": None})
    if dist.get_rank() == 0:
        write_lines(out, [json.dumps(line, ensure_ascii=False) for line in lines])
    dist.barrier()


# ---- stage: ar


def train_ar(
    base: Path,
    start: Path | None,
    rows: Rows,
    samples: Path,
    out: Path,
    *,
    minutes: float,
    steps: int | None,
    settings: Settings,
    rate: float,
) -> dict[str, Any]:
    """Train the AR to regress vectors on AV draws, and on some true text so that it also fits a better AV."""
    tokenizer = pair.load_tokenizer(base)
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    ar = pair.load_ar(base, start)
    pair.with_fast_lora(ar.model)
    adapters = [p for p in ar.model.parameters() if p.requires_grad]
    parameters = [*adapters, ar.value_head.weight]
    trainer = pair.Trainer(parameters, [rate] * len(adapters) + [rate / 4])
    clock = Clock(minutes, steps, out.with_suffix(".checkpoint"), trainer)
    prompt = pair.Prompt.of(tokenizer)

    def save(into: Path) -> None:
        pair.save_ar(ar, into, pair.sidecar("ar", prompt, digest(base), clock.reached(settings.ar_batch)))

    save_if_asked(clock, settings, out.parent / "series", "ar", save)
    rng = np.random.default_rng([settings.seed, 1, dist.get_rank(), clock.step])
    size = settings.ar_batch // dist.get_world_size()
    order: list[int] = []
    recent: list[float] = []
    while clock.progress < 1.0:
        if len(order) < size:
            order = rng.permutation(len(lines)).tolist()
        batch = [lines[order.pop()] for _ in range(size)]
        predicted = ar(*pair.padded(tokenizer, [line["text"] for line in batch]))
        loss = pair.ar_error(predicted, rows.vector[[line["row"] for line in batch]]).mean()
        loss.backward()
        clock.tick()
        save_if_asked(clock, settings, out.parent / "series", "ar", save)
        recent.append(float(loss.detach()))
        if clock.step % 20 == 0:
            say(f"{out.name} step {clock.step} ({clock.progress:.0%}): error {np.mean(recent[-20:]):.3f}")
    save_in_place(out, save)
    clock.forget()
    return clock.reached(settings.ar_batch)


# ---- stage: a round of the AV on the best of its own draws


def best_draws(
    base: Path, av_adapter: Path, ar_adapter: Path, rows: Rows, *, num_draws: int, temperature: float, seed: int
) -> Rows:
    """Return as training targets, for each vector, the draw that the AR reconstructs best."""
    tokenizer = pair.load_tokenizer(base)
    found = draw_texts(base, av_adapter, rows.vector, temperature=temperature, num_draws=num_draws, seed=seed)
    ar = pair.load_ar(base, ar_adapter)
    own = range(dist.get_rank(), len(found), dist.get_world_size())
    usable = [(row, draw) for row in own for draw in found[row] if 2 < len(draw) <= CONTEXT]
    predicted = pair.reconstruct(ar, tokenizer, [tokenizer.decode(draw).strip() for _, draw in usable])
    errors = pair.ar_error(predicted, rows.vector[[row for row, _ in usable]]).tolist()
    scored: dict[int, list[tuple[float, list[int]]]] = {row: [] for row in own}
    for (row, draw), error in zip(usable, errors, strict=True):
        scored[row].append((error, draw))
    mine = [
        (*reversed(min(draws)), float(np.mean([e for e, _ in draws]))) if draws else ([], 2.0, 2.0) for draws in scored.values()
    ]
    best = interleaved(mine, len(found))
    means = np.mean([[error for error in row[1:]] for row in best], axis=0)
    say(f"{len(best)} vectors: best of {num_draws} draws has error {means[0]:.3f}, their mean {means[1]:.3f}")
    kept = [i for i, (tokens, _, _) in enumerate(best) if tokens]
    context = np.zeros((len(kept), CONTEXT), dtype=np.int64)
    for at, i in enumerate(kept):
        context[at, CONTEXT - len(best[i][0]) :] = best[i][0]
    return Rows(vector=rows.vector[kept], context=context, length=np.array([len(best[i][0]) for i in kept]))


# ---- stage: report


def evaluate(
    base: Path,
    av_adapter: Path,
    ar_adapter: Path,
    rows: Rows,
    clusters: list[str],
    *,
    temperatures: list[float],
    num_draws: int,
    max_new_tokens: int = 32,
    seed: int = 1,
) -> dict[str, Any]:
    """Return the FVE of best-of-K for each temperature on held-out activations. Draws are complete: tags are sampled too."""
    tokenizer = pair.load_tokenizer(base)
    prompt = pair.Prompt.of(tokenizer)
    av = pair.with_lora(pair.load_base(base), av_adapter).eval().base_model.model
    ar = pair.load_ar(base, ar_adapter)
    rank, workers = dist.get_rank(), dist.get_world_size()
    own = np.arange(rank, len(rows.vector), workers)
    table: dict[str, Any] = {"baseline": baseline(rows.vector), "num_activations": len(rows.vector), "num_draws": num_draws}
    table["activation_norm"] = round(float(rows.vector.norm(dim=1).median()), 1)
    for temperature in temperatures:
        generator = torch.Generator().manual_seed(seed * 1000 + rank)
        mine = []
        for start in range(0, len(own), 8):
            vectors = rows.vector[own[start : start + 8]]
            found = pair.draw(
                av,
                prompt,
                vectors,
                num_draws=num_draws,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                generator=generator,
            )
            mine += [found[i : i + num_draws] for i in range(0, len(found), num_draws)]
        draws = interleaved(mine, len(rows.vector))
        table[str(temperature)] = score(ar, tokenizer, draws, rows.vector, clusters)
        say(f"temperature {temperature}: {json.dumps({k: v for k, v in table[str(temperature)].items() if k != 'examples'})}")
    return table


def baseline(vectors: Tensor) -> float:
    """Return the mean squared distance of the unit-scaled activations from their un-normalised mean."""
    unit = pair.scaled(vectors, pair.WIDTH**0.5)
    return float(((unit - unit.mean(0)) ** 2).mean())


def score(
    ar: pair.Reconstructor, tokenizer: Any, draws: list[list[list[int]]], vectors: Tensor, clusters: list[str]
) -> dict[str, Any]:
    outputs = [[tokenizer.decode(tokens) for tokens in row] for row in draws]
    payloads = [[pair.payload(text) for text in row] for row in outputs]
    flat = [text or "" for row in payloads for text in row]
    failed = np.array([[text is None for text in row] for row in payloads])
    predicted = pair.reconstruct(ar, tokenizer, flat).view(*failed.shape, -1)
    own = np.where(failed, np.inf, pair.ar_error(predicted, vectors[:, None]).numpy())
    other = np.where(failed, np.inf, pair.ar_error(predicted, vectors.roll(len(vectors) // 2, 0)[:, None]).numpy())
    ks = [k for k in (1, 2, 4, 8, 16) if k <= failed.shape[1]]
    unit = pair.scaled(vectors, pair.WIDTH**0.5).numpy()
    error = {k: best_of_k(own, k) for k in ks}
    base = baseline(vectors)
    return {
        "fve": {k: round(1 - float(error[k].mean()) / base, 3) for k in ks},
        "interval": {k: interval(error[k], unit, clusters) for k in (ks[0], ks[-1])},
        "shuffled": {k: round(1 - float(best_of_k(other, k).mean()) / base, 3) for k in ks},
        "failure_rate": round(float(failed.mean()), 4),
        "tokens_per_draw": round(float(np.mean([len(d) for row in draws for d in row])), 2),
        "distinct_share": round(len(set(flat)) / len(flat), 3),
        "examples": [payloads[i][:4] for i in range(0, len(payloads), max(1, len(payloads) // 8))],
    }


def best_of_k(errors: np.ndarray, k: int) -> np.ndarray:
    """Return the expected smallest of k errors per row: weight C(N-i, k-1) / C(N, k) for the i-th smallest of N. A failed draw is
    inf: it sorts last and counts as 2.0."""
    ordered = np.sort(errors, axis=1)
    ordered[np.isinf(ordered)] = 2.0
    n = errors.shape[1]
    weights = np.array([math.comb(n - i, k - 1) / math.comb(n, k) for i in range(1, n + 1)])
    return ordered @ weights


def interval(errors: np.ndarray, unit: np.ndarray, clusters: list[str], replicates: int = 500) -> list[float]:
    """Return the 95 % bootstrap interval of FVE over documents; the baseline is recomputed in each replicate."""
    names, index = np.unique(clusters, return_inverse=True)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(replicates):
        weight = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))[index].astype(float)
        mean = weight @ unit / weight.sum()
        spread = weight @ ((unit - mean) ** 2).mean(1)
        values.append(1 - (weight @ errors) / spread)
    return [round(float(v), 3) for v in np.quantile(values, [0.025, 0.975])]


def export(base: Path, av_adapter: Path, ar_adapter: Path, demo: Path, report: dict[str, Any]) -> None:
    """Write the pair, its tokenizer and the report to ksweep/demo; each directory appears complete."""
    if dist.get_rank() == 0:
        with_tokenizer = av_adapter.with_name("av-export")
        shutil.rmtree(with_tokenizer, ignore_errors=True)
        shutil.copytree(av_adapter, with_tokenizer)
        pair.load_tokenizer(base).save_pretrained(with_tokenizer)
        for source, name in ((with_tokenizer, "av"), (ar_adapter, "ar")):
            part = demo / f".{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(source, part)
            shutil.rmtree(demo / name, ignore_errors=True)
            part.rename(demo / name)
        (demo / "training_report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    dist.barrier()


# ---- putting the stages in order


def split(rows: Rows, passage: np.ndarray, settings: Settings) -> tuple[Rows, Rows]:
    """Return the AV's rows, and rows of other passages whose draws the AR learns from."""
    return subset(rows, passage < settings.num_av_passages), subset(rows, passage >= settings.num_av_passages)


def subset(rows: Rows, keep: np.ndarray) -> Rows:
    """Return some of the rows; `keep` is a mask or row numbers."""
    return Rows(vector=rows.vector[torch.from_numpy(keep)], context=rows.context[keep], length=rows.length[keep])


def worker(rank: int, options: argparse.Namespace) -> None:
    """Run all stages after the activations as one of several workers, which go in step and share the rows of each stage."""
    torch.set_num_threads(1)
    work, base, settings = options.work, options.base, settings_of(options)
    dist.init_process_group("gloo", init_method=f"file://{work}/store", rank=rank, world_size=options.workers)
    share = options.minutes / DEFAULT_MINUTES
    passage = np.load(work / "vectors.npz")["passage"]
    av_rows, ar_rows = split(load_rows(work / "vectors.npz", base, settings), passage, settings)
    held_out = load_rows(work / "held_out.npz", base, settings)
    reached: dict[str, Any] = {}

    def stage(name: str, run: Callable[[Path], Any]) -> Path:
        path = work / name
        note = work / f"{path.stem}.reached.json"
        if not path.exists():
            say(f"stage {name}")
            result = run(path)
            if rank == 0:
                write_lines(note, [json.dumps(result)])
            dist.barrier()
        reached[name] = json.loads(note.read_text()) if note.exists() else None
        return path

    def timed(minutes: float, rate: float) -> dict[str, Any]:
        return {"minutes": minutes * share, "steps": options.steps, "settings": settings, "rate": rate}

    av = options.av or stage(
        "av-0", lambda out: train_av(base, None, av_rows, held_out, out, **timed(settings.av_minutes, settings.av_rate))
    )
    sampled = subset(ar_rows, np.arange(min(settings.num_sampled, len(ar_rows.length))))
    samples = stage("samples-0.jsonl", lambda out: write_samples(base, av, sampled, out, settings.temperatures, seed=10))
    ar = stage("ar-0", lambda out: train_ar(base, None, sampled, samples, out, **timed(settings.ar_minutes, settings.ar_rate)))
    for number in range(1, options.rounds + 1):
        best = stage(f"best-{number}.npz", lambda out, av=av, ar=ar: write_best(base, av, ar, av_rows, out, settings))
        av = stage(
            f"av-{number}",
            lambda out, av=av, best=best: train_av(
                base, av, load_best(best), held_out, out, **timed(settings.round_minutes, settings.av_rate / 3)
            ),
        )
        samples = stage(
            f"samples-{number}.jsonl",
            lambda out, av=av, seed=20 + number: write_samples(base, av, sampled, out, settings.temperatures, seed),
        )
        ar = stage(
            f"ar-{number}",
            lambda out, ar=ar, samples=samples: train_ar(
                base, ar, sampled, samples, out, **timed(settings.ar_minutes / 2, settings.ar_rate / 2)
            ),
        )
    if options.no_report:
        return
    report = finish(base, work, av, ar, held_out, settings, reached)
    export(base, av, ar, options.out, report)


def write_best(base: Path, av: Path, ar: Path, rows: Rows, out: Path, settings: Settings) -> None:
    first = subset(rows, np.random.default_rng(settings.seed).permutation(len(rows.length))[: settings.num_round])
    best = best_draws(base, av, ar, first, num_draws=settings.round_draws, temperature=0.8, seed=30)
    if dist.get_rank() == 0:
        save_arrays(out, {"vector": best.vector.numpy(), "context": best.context, "length": best.length})
    dist.barrier()


def load_best(path: Path) -> Rows:
    data = np.load(path)
    return Rows(vector=torch.from_numpy(data["vector"]), context=data["context"], length=data["length"])


def finish(
    base: Path, work: Path, av: Path, ar: Path, held_out: Rows, settings: Settings, reached: dict[str, Any]
) -> dict[str, Any]:
    """Return the report: what each stage reached, and held-out FVE."""
    passages = [json.loads(line) for line in (work / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    data = np.load(work / "held_out.npz")
    chosen = np.random.default_rng(settings.seed).permutation(len(held_out.length))[: settings.num_evaluated]
    clusters = [passages[data["passage"][i]]["document"] for i in chosen]
    table = evaluate(
        base,
        av,
        ar,
        subset(held_out, chosen),
        clusters,
        temperatures=list(settings.report_temperatures),
        num_draws=16,
        max_new_tokens=settings.max_new_tokens,
    )
    return {"settings": asdict(settings), "stages": reached, "held_out": table}


def steps_of(text: str) -> tuple[int, ...]:
    """Return the steps of a list such as "0,10,20"."""
    return tuple(int(step) for step in text.split(","))


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings with what the command line changes; an AV that is there already needs no passages of its own."""
    num_passages = options.passages or Settings.num_passages
    num_av_passages = 0 if options.av else min(Settings.num_av_passages, num_passages * 21 // 25)
    return Settings(
        num_passages=num_passages, num_av_passages=num_av_passages, num_sampled=options.vectors, save_at=options.save_at
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="of training in all; scales every stage")
    parser.add_argument("--steps", type=int, default=None, help="steps of every training stage, instead of minutes")
    parser.add_argument("--av", type=Path, default=None, help="an AV that is there already; only the AR is trained")
    parser.add_argument("--passages", type=int, default=None, help=f"of training text ({Settings.num_passages})")
    parser.add_argument("--vectors", type=int, default=Settings.num_sampled, help="whose draws the AR learns from")
    parser.add_argument(
        "--save-at", type=steps_of, default=(), metavar="STEPS", help="also keep AV and AR after these steps, such as 0,10,20,40"
    )
    parser.add_argument("--rounds", type=int, default=0, help="rounds of training the AV on the best of its own draws")
    parser.add_argument("--no-report", action="store_true", help="only train: no held-out FVE, and nothing is written to --out")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; as many as free cores")
    parser.add_argument("--work", type=Path, default=HOME / "demo_training", help="where the stages leave their files")
    parser.add_argument("--base", type=Path, default=HOME / "models" / "smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "ksweep" / "demo")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    if not (options.base / "model.safetensors").exists():
        subprocess.run([sys.executable, str(Path(__file__).with_name("fetch_demo_model.py"))], check=True)
    if not (options.work / "training.jsonl").exists():
        prepare_texts(options.work, options.base, settings_of(options))
    if not (options.work / "vectors.npz").exists():
        prepare_vectors(options.work, options.base, settings_of(options))
    (options.work / "store").unlink(missing_ok=True)
    torch.multiprocessing.spawn(worker, args=(options,), nprocs=options.workers)
    if not options.no_report:
        shutil.copy(options.work / "held_out.jsonl", options.out / "passages.jsonl")


if __name__ == "__main__":
    main()
