"""How fast does the AR read explanations, beside the whole model over them in the order they come?

    python scripts/bench_scoring.py                       # 512 texts of the demo pair's AV
    python scripts/bench_scoring.py --template prototype --draws 64 --temperature 0.4
    python scripts/bench_scoring.py --texts 128 --repeats 3 --template demo

Texts are put into the template of the released pairs, into one of 22 tokens before the text and 11 after it, or into the demo's
own, which is one word: what comes of the first two means nothing, their cost is what it would be at this size.

The other side is the reference sweep's: the full causal language model with its head over every token and all hidden states kept,
16 texts a batch, in the order they were drawn; its own read-out of the last token of the AR's layer is the same product. It runs
the AR's base, which costs what the AR would if its upper blocks were there. Texts repeat as often as sampled ones do.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
import yaml
from bench_common import alternate, held_out, load_pair, parser, rate, report
from transformers import AutoModelForCausalLM

from ksweep.autoencoder.nla.models import NlaReconstructor, NlaVerbalizer, load_nla_reconstructor
from ksweep.config.presets import demo_model, demo_pair
from ksweep.inference.engine import Request, draw

TEMPLATES = {
    "released": "Summary of the following text: <text>{explanation}</text> <summary>",
    "prototype": "The text below was written to describe one activation of a model. Read the text closely:\n<text>{explanation}"
    "</text>\nThe activation described: <summary>",
}
"""Of the released pairs, and one as long (22 tokens before the text, 11 after it) as that of the trial which set the goal."""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    av, ar = load_pair(options.dtype)
    if options.template in TEMPLATES:
        ar = with_template(TEMPLATES[options.template], options.dtype)
    texts = drawn_texts(av, options)
    whole = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=getattr(torch, options.dtype)).eval()
    sides = {
        f"full model, {options.batch_size} texts a batch as they come": lambda: read_by_all_of_it(
            whole, ar, texts, options.batch_size
        ),
        "ours": lambda: len(ar.reconstruct_texts(texts)),
    }
    rates = alternate({name: rate(side) for name, side in sides.items()}, options.repeats)
    tokens = sum(map(len, ar.prompts.ids(texts))) / len(texts)
    title = f"{len(texts)} texts, {options.draws} an activation, {len(set(texts))} distinct, {tokens:.0f} tokens each in the "
    title += f"{options.template} template ({len(ar.prompts.common)} of them before the text)"
    title += f"; {options.threads} threads, {options.dtype}"
    report(title, "texts/s", rates, next(iter(sides)))


def arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--texts", type=int, default=512)
    options.add_argument("--template", choices=(*TEMPLATES, "demo"), default="released")
    options.add_argument("--draws", type=int, default=16, help="of one activation")
    options.add_argument("--temperature", type=float, default=0.7)
    options.add_argument("--batch-size", type=int, default=16, help="the full model's")
    return options.parse_args()


def with_template(template: str, dtype: str) -> NlaReconstructor:
    """The demo's AR, but for the words around each text."""
    pair = demo_pair()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(shutil.copytree(pair.ar or "", f"{folder}/ar"))
        sidecar = yaml.safe_load((place / "nla_meta.yaml").read_text())
        sidecar["prompt_templates"]["ar"] = template
        (place / "nla_meta.yaml").write_text(yaml.safe_dump(sidecar))
        return load_nla_reconstructor(place, base=pair.base, dtype=dtype)


def drawn_texts(av: NlaVerbalizer, options: argparse.Namespace) -> list[str]:
    """Explanations in the order in which the reference would score them: all of one activation after the other."""
    vectors = held_out(max(1, options.texts // options.draws))
    requests = [Request(row, row * 7919, k) for row in range(len(vectors)) for k in range(options.draws)]
    found = draw(av, vectors, requests, temperature=options.temperature, max_new_tokens=64, seed=0)
    draws = sorted(found, key=lambda d: (d.request.row, d.request.draw))
    return [av.parse(av.decode(d.text_token_ids), d.finish)[0] or "" for d in draws]


@torch.inference_mode()
def read_by_all_of_it(model: torch.nn.Module, ar: NlaReconstructor, texts: list[str], batch_size: int) -> int:
    for start in range(0, len(texts), batch_size):
        rows = ar.prompts.ids(texts[start : start + batch_size])
        width = max(map(len, rows))
        ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[ar.info.layer + 1]
        ar.head(states[torch.arange(len(rows)), mask.sum(1) - 1]).float()
    return len(texts)


if __name__ == "__main__":
    main()
