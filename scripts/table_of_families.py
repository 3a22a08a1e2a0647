"""Write docs/families.md: run every family's tiny random pair against full-context transformers, and put down what holds.

    python scripts/table_of_families.py

A minute on one core. tests/autoencoder/test_families.py runs the same checks and compares each row with the file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# Model families

What AVs, ARs and the models that activations come from can be built on. Every row was run on a tiny random model of the
architecture, in float32, against transformers {version} with eager attention, whole prompts and no cache:

* **AV**: sampled draws have the log probabilities that one pass over prompt and text gives their tokens;
* **AR**: reconstructions are the value head's map of the last block's output at the last token, each prompt alone; and the first
  blocks of a whole model, which an adapter or a head alone is used over, put out what they do in it (refused where a row says *of
  full weights alone*);
* **base**: activations are the block's output in the whole model, at every token of rows of unlike length;
* **engine**: what `sampling.engine=builtin` draws with: *slots* (prompts shared, continuous batching), or where a model cannot be
  kept in slots the naive engine, which is slower and takes the same draws. Models with a sliding window leave slots for texts
  longer than it. Linear attention, convolutions and state spaces keep states that cannot be continued for several texts at once:
  there an AR's prompts run whole, without the shared template.

Other architectures of transformers are not refused: the launcher builds AV, AR and base (with its adapter) on the meta device,
compares names and shapes of the weights with the files, and says what it cannot find. Trained checkpoints were run only where the
README says so.

Weights may be stored quantised: FP8 (compressed-tensors, fine-grained as DeepSeek-V3's), MXFP4 (gpt-oss; its loading is
transformers' own and not among our tests) and 4-bit bitsandbytes, the first and the last with their package installed. They are
computed back to `autoencoder.dtype` while they are loaded, on any device: so they take the memory of plain weights, adapters
merge into them, and no kernel rounds once more. Other methods, and packages that are missing, are refused before a job is
submitted.

| family | `model_type` | AV | AR | base | engine |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Run every row, and write the file."""
    sys.path.insert(0, str(ROOT))
    import transformers

    from tests.tiny_families import FAMILIES, check_family

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            rows.append(check_family(Path(directory), family))
        print(rows[-1].line(), *rows[-1].reasons, sep="\n  ", flush=True)
    table = "".join(f"{row.line()}\n" for row in rows)
    reasons = "".join(f"* {reason}\n" for row in rows for reason in row.reasons)
    head = HEAD.format(version=transformers.__version__)
    text = f"{head}{table}\nRefused, before a job is submitted where headers show it:\n\n{reasons}"
    (ROOT / "docs" / "families.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
