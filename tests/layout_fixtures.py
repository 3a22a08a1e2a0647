"""The golden fixtures of the layouts easynla and nla-at-home: how a user would name each, and what its arrays differ by.

python -m tests.layout_fixtures       # worst difference per array
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ksweep import Autoencoder
from ksweep.autoencoder.family import family_of
from ksweep.autoencoder.nla.models import NlaReconstructor, NlaVerbalizer
from ksweep.config.spec import PromptingOverrides
from ksweep.inference.prefill import prefill
from tests.report_fixture_differences import Difference, _difference, scores, verbalize

LAYOUTS = Path(__file__).parent / "fixtures" / "layouts"


@dataclass(frozen=True)
class LayoutCase:
    """One pair of a fixture: its halves, and the suffix of its arrays."""

    fixture: str
    av: str
    ar: str
    suffix: str = ""

    @property
    def directory(self) -> Path:
        return LAYOUTS / self.fixture

    @property
    def expected(self) -> dict[str, Any]:
        return _expected(self.fixture)

    def spec(self, root: Path | None = None, **changes: Any) -> Autoencoder:
        """The pair as a user names it: a base that no file knows, and the chat arguments that no file states."""
        root = root or self.directory
        said = self.expected["av"].get("chat_template_kwargs")
        prompting = PromptingOverrides(chat_arguments=said) if said else PromptingOverrides()
        values = {"av": str(root / self.av), "ar": str(root / self.ar), "base": str(root / "base"), "dtype": "float32"}
        return Autoencoder(**(values | {"prompting": prompting} | changes))

    def av_said(self) -> dict[str, Any]:
        said: dict[str, Any] = self.expected["av"]
        return said[self.suffix] if self.fixture == "nla_at_home_marker" else said


CASES = {
    "easynla merged": LayoutCase("easynla_qwen3_merged", "av", "ar"),
    "easynla lora": LayoutCase("easynla_gemma3_lora", "av/iter_0000500", "ar/iter_0000500"),
    "easynla norm kept": LayoutCase("easynla_gemma3_lora", "av/iter_0000500", "ar_norm_kept/iter_0000500", "__norm_kept"),
    "nla-at-home": LayoutCase("nla_at_home_marker", "av", "ar"),
    "nla-at-home raw": LayoutCase("nla_at_home_marker", "av_raw", "ar", "__raw"),
}


@cache
def _expected(fixture: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((LAYOUTS / fixture / "expected.json").read_text())
    return values


def load_pair(spec: Autoencoder) -> tuple[NlaVerbalizer, NlaReconstructor]:
    """Both halves of a pair, loaded as a rank loads them."""
    family = family_of(spec)
    av, ar = family.load_verbalizer(("cpu",)), family.load_reconstructor(("cpu",))
    assert isinstance(av, NlaVerbalizer) and isinstance(ar, NlaReconstructor)
    return av, ar


def layout_differences(name: str) -> Iterator[Difference]:
    """Everything that a pair computes in float32, against expected.npz."""
    case = CASES[name]
    expected = np.load(case.directory / "expected.npz")
    av, ar = load_pair(case.spec())
    activations = torch.tensor(expected["activations"])
    of_av = case.suffix if case.fixture == "nla_at_home_marker" else ""
    embeds, logits, greedy = verbalize(av, activations, expected["av_greedy_ids"].shape[1])
    if "av_residual_after" in expected:
        before, after = residuals(av, activations)
        yield _named("av_residual_before", before, expected, 1e-5)
        yield _named("av_residual_after", after, expected, 1e-5)
    else:
        yield _named(f"av_injected_row{of_av}", embeds[:, av.injection_position], expected, 1e-6)
    yield _named(f"av_next_token_logits{of_av}", logits, expected, 1e-4)
    yield _named(f"av_greedy_ids{of_av}", greedy, expected, 0)
    of_ar = "" if of_av else case.suffix
    reconstructions = ar.reconstruct_texts(case.expected["ar"]["texts"]).numpy()
    errors, cosines = scores(reconstructions, expected["activations"])
    yield _named(f"ar_reconstructions{of_ar}", reconstructions, expected, 1e-4)
    yield _named(f"ar_mse_nrm{of_ar}", errors, expected, 1e-5, absolute=True)
    yield _named(f"ar_cos{of_ar}", cosines, expected, 1e-5, absolute=True)


def residuals(av: NlaVerbalizer, activations: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The output of block 1 at the marker: without a vector, [d_model], and with each, [activation, d_model]."""
    outputs: list[torch.Tensor] = []

    def look(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = av.model.model.layers[1].register_forward_hook(look)
    with torch.inference_mode():
        av.model(input_ids=torch.tensor([av.prompt_ids]))
    handle.remove()
    prompts = av.prompts(activations)
    handle = av.model.model.layers[2].register_forward_pre_hook(lambda _module, args: outputs.append(args[0]))
    prefill(av.model, prompts)
    handle.remove()
    at = av.injection_position
    return outputs[0][0, at].numpy(), outputs[-1][:, at].numpy()


def _named(name: str, found: np.ndarray, expected: Any, allow: float, absolute: bool = False) -> Difference:
    return _difference(name, found, expected, allow, absolute)


def main() -> None:
    print(f"{'case':18} {'array':26} {'worst abs':>10} {'relative':>10} {'allow':>12}")
    for name in CASES:
        for d in layout_differences(name):
            allow = f"{d.allow:g} {'abs' if d.allow_is_absolute else 'rel'}"
            print(f"{name:18} {d.array:26} {d.absolute:10.2e} {d.relative:10.2e} {allow:>12}  {'ok' if d.ok else 'TOO FAR'}")


if __name__ == "__main__":
    main()
