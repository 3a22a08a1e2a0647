"""Parts about sameness: are the GPU's draws those of the CPU, and do a row's numbers depend on the rows beside it?"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from gpu_common import Setting, graphs, large_verbalizer, requests, same_texts, say, texts_of

from ksweep.cli.selftest import failures
from ksweep.inference import cuda_graphs, gumbel_sampling
from ksweep.inference.engine import draw
from ksweep.inference.prefill import prefill, prefill_prefix
from tests.inference.test_engine import MODELS, STOPS, VECTORS, TinyVerbalizer
from tests.report_fixture_differences import CASES, differences

SAMPLING: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.6}, {"temperature": 0.0}]


def family_verbalizers(device: torch.device) -> dict[str, TinyVerbalizer]:
    """Return the test suite's families on a device."""
    made = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        made[name] = TinyVerbalizer(build().eval().to(device), STOPS)
    return made


def drawn_texts(av: Any, **options: Any) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return the texts of 16 draws of six activations."""
    options = {"temperature": 1.0, "max_new_tokens": 40, "seed": 7, "batch_size": 64} | options
    return texts_of(list(draw(av, VECTORS, requests(range(len(VECTORS)), 16), **options)))


def smoke(setting: Setting) -> None:
    """Noise, golden fixtures, draws of six families with and without graphs, and the selftest: as on the CPU?"""
    noise_parity(setting)
    for case in CASES:
        for found in differences(case, str(setting.device)):
            verdict = "ok" if found.ok else "TOO FAR"
            say(f"fixture {case:12} {found.array:22} off by {found.relative:.1e}, allowed {found.allow:g}: {verdict}")
    draw_parity(setting)
    if problems := failures(setting.device.type):
        raise RuntimeError("; ".join(problems))
    say("selftest: nothing wrong")


def noise_parity(setting: Setting) -> None:
    """Integers must be equal bit for bit, sampled tokens but for rare ties."""
    counters, device = list(range(500)), setting.device
    here, there = (gumbel_sampling.draw_keys(3, counters, counters, where) for where in ("cpu", device))
    steps = torch.arange(500)
    for name, first, second in (
        ("keys of draws", here, there),
        ("keys of a step", gumbel_sampling.step_keys(here, 5), gumbel_sampling.step_keys(there, 5)),
        ("keys of a step each", gumbel_sampling.step_keys(here, steps), gumbel_sampling.step_keys(there, steps.to(device))),
        ("uniforms", gumbel_sampling.uniforms(here, 600, 1 << 32), gumbel_sampling.uniforms(there, 600, 1 << 32)),
    ):
        if not torch.equal(first, second.cpu()):
            raise RuntimeError(f"noise: {name} differ from the CPU's")
        say(f"noise: {name} equal")
    logits = 4 * torch.randn(500, 3000 if setting.tiny else 152064, generator=torch.Generator().manual_seed(0))
    for options in (*SAMPLING, {"temperature": 1.0, "top_p": 0.9}):
        first, second = (
            gumbel_sampling.sample(logits, here, **options),
            gumbel_sampling.sample(logits.to(device), there, **options),
        )
        equal = int((first.token_ids == second.token_ids.cpu()).sum())
        worst = float((first.log_probabilities - second.log_probabilities.cpu()).abs().max())
        say(f"noise: {options}: {equal} of 500 tokens equal, log probabilities within {worst:.1e}")


def draw_parity(setting: Setting) -> None:
    """Texts of the test suite's families: those of the CPU, without graphs and with graphs recorded early."""
    here, there = family_verbalizers(torch.device("cpu")), family_verbalizers(setting.device)
    for name in here:
        for options in SAMPLING[: 1 if setting.tiny else None]:
            expected, said = drawn_texts(here[name], **options), []
            for on in (False, True) if setting.on_gpu else (False,):
                with ExitStack() as stack:
                    stack.enter_context(graphs(on))
                    stack.enter_context(patch.object(cuda_graphs, "USES_BEFORE_RECORDING", 2))
                    texts = drawn_texts(there[name], **options)
                    state = cuda_graphs.cuda_graphs_state(there[name].model)
                said.append(f"graphs {state}: {same_texts(expected, texts)}")
            say(f"draws of {name:14} {options}: {'; '.join(said)}")


@torch.inference_mode()
def invariance(setting: Setting) -> None:
    """How far do logits of one row move with the number of rows beside it, and how many draws are others for it?"""
    av, rows = large_verbalizer(setting), setting.rows[-1]
    vectors = torch.randn(max(4, rows // 16), av.d_model, generator=torch.Generator().manual_seed(0))
    # 1. Logits after the prompt of the first activation, among others.
    alone = None
    for count in sorted({1, *(max(1, n // 16) for n in setting.rows)}):
        prompts = av.prompts(vectors[:count])
        logits = prefill(av.model, prompts, prefill_prefix(av.model, prompts)).logits[:1].float()
        alone = logits if alone is None else alone
        change = (logits - alone).abs()
        say(
            f"prompt among {count}: logits off by up to {float(change.max()):.3f}, mean {float(change.mean()):.4f}, "
            f"of std {float(alone.std()):.2f}"
        )
    # 2. Draws of the first four activations, at several numbers of draws in flight.
    texts = {}
    for count in (setting.rows[-1], setting.rows[-2], setting.rows[0]):
        wanted = requests(range(max(4, count // 16)), 16)
        drawn = draw(av, vectors, wanted, temperature=1.0, max_new_tokens=setting.tokens, seed=0, batch_size=count)
        texts[count] = texts_of([one for one in drawn if one.request.row < 4])
    first = texts[rows]
    for count, found in texts.items():
        until = sorted(_first_difference(first[key], found[key]) for key in first if first[key] != found[key])
        where = f"; first difference at token {until[len(until) // 2]} (median)" if until else ""
        say(f"{av.model.dtype}, {rows} against {count} draws at once: {same_texts(first, found)}{where}")


def _first_difference(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
