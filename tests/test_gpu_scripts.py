"""scripts/gpu on a processor: parts of the check run, and the scripts that need no GPU give figures known from elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from ksweep.utils.safetensors_header import bytes_of_weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts() -> SimpleNamespace:
    """The modules of scripts/gpu by name."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "gpu")]
    try:
        import attention_error
        import check
        import host_cost
        import large_models
        import launches
        import roofline
    finally:
        sys.path[:] = before
    modules: list[ModuleType] = [attention_error, check, host_cost, large_models, launches, roofline]
    return SimpleNamespace(**{module.__name__: module for module in modules})


@pytest.mark.parametrize(
    ("part", "said"), [("env", "launch of a kernel"), ("pieces", "attention of a block"), ("memory", "only a GPU can tell")]
)
def test_a_tiny_part_of_the_check_runs_on_a_processor(
    scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str], part: str, said: str
) -> None:
    scripts.check.PARTS[part](scripts.check.Setting(True, torch.device("cpu")))
    assert said in capsys.readouterr().out


def test_run_reports_every_part_and_ends_with_1_where_one_fails(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "called: $@"\ncase "$*" in *env*) exit 3;; esac\n')
    python.chmod(0o755)

    def run(parts: str) -> tuple[int, str]:
        environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path), "PARTS": parts, "TINY": "1"}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts/gpu/run.sh")], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout.splitlines()[-1] in (tmp_path / "report.txt").read_text()
        return done.returncode, done.stdout

    code, said = run("env smoke tests")
    assert code == 1 and "env ended with 3" in said and "smoke ended with 0" in said and "1 parts failed: env" in said
    assert "smoke --tiny" in said and "-m pytest" in said
    assert run("smoke")[0] == 0


def test_every_part_of_run_is_one_of_check_and_in_the_readme(scripts: SimpleNamespace) -> None:
    text = (ROOT / "scripts/gpu/run.sh").read_text()
    parts = text.partition('all="')[2].partition('"')[0].split()
    assert set(parts) == {*scripts.check.PARTS, "tests"}
    rows = (ROOT / "scripts/gpu/README.md").read_text().splitlines()
    assert all(any(row.startswith(f"| {part} |") for row in rows) for part in parts)


def test_attention_is_as_exact_as_torchs_fused_kernel_and_rounded_scores_are_not(scripts: SimpleNamespace) -> None:
    torch.manual_seed(0)
    rounded, ours, fused = (float(column) for column in scripts.attention_error.row(4).split("|")[3:6])
    assert ours < 1.5 * fused and rounded > 3 * ours


def test_launches_counts_the_kernels_of_a_step_and_its_waits(scripts: SimpleNamespace) -> None:
    steps, count = scripts.launches.launches(layers=2, draws=8, temperature=0.8, tokens=6)
    graph = count.launches["model's step (in the graph)"]
    # Two blocks of seven products each and the head, in every step but those that take first tokens.
    assert graph["linear"] == (2 * 7 + 1) * (graph["embedding"])
    assert 0 < graph["embedding"] < steps
    assert "sampling" in count.launches and "moves of rows" in count.launches


def test_host_cost_is_that_of_a_step_with_no_model(scripts: SimpleNamespace) -> None:
    whole, sampling = scripts.host_cost.step_cost(32, 16)
    assert 0 < sampling < whole


def test_roofline_bound_is_weights_read_once_at_few_rows_and_products_at_many(scripts: SimpleNamespace) -> None:
    # Qwen2.5-7B without its embeddings, from its config.json:
    # 28 (3584 (3584 + 2 x 512) + 3584^2 + 3 x 3584 x 18944) + 152064 x 3584 = 7,070,285,824.
    # 64 rows read 14.1 GB at 4.3 TB/s; 768 multiply at 790 TFLOP/s.
    shape, h200 = scripts.roofline.SHAPES["Qwen2.5-7B"], scripts.roofline.DEVICES["H200"]
    assert shape.multiplied == 7_070_285_824
    bound = {rows: scripts.roofline.line("7B", shape, h200, rows).split("|")[4].strip() for rows in (64, 768)}
    assert bound == {64: "19,462", 768: "55,868"}


def test_page_on_large_models_has_the_tables_of_the_script(scripts: SimpleNamespace) -> None:
    page = scripts.large_models.PAGE.read_text()
    for pair in scripts.large_models.PAIRS:
        assert f"\n{scripts.large_models.table(pair)}\n" in page, "python scripts/gpu/large_models.py writes them"


@pytest.mark.parametrize("name", ["Llama-3.3-70B", "Gemma-3-27B"])
def test_sizes_of_large_pairs_are_those_that_a_rank_reads_from_the_headers_of_such_files(
    scripts: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    """Files of the shapes that transformers gives such models, with nothing in them."""
    [pair] = (pair for pair in scripts.large_models.PAIRS if pair.name == name)
    shape = pair.shape
    sizes = {
        "hidden_size": shape.width, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "head_dim": shape.head_dim, "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocabulary,
    }  # fmt: skip
    build = {"Llama-3.3-70B": (LlamaForCausalLM, LlamaConfig), "Gemma-3-27B": (Gemma3ForCausalLM, Gemma3TextConfig)}[name]
    with torch.device("meta"):
        model = build[0](build[1](**sizes, tie_word_embeddings=pair.shares_embeddings))
    header: dict[str, object] = {}
    end = 0
    for tensor, parameter in model.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[tensor] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert bytes_of_weights(tmp_path, "bfloat16") == pytest.approx(pair.av_bytes, rel=1e-4)
    head = 2 * shape.width**2 - (0 if pair.shares_embeddings else 2 * shape.vocabulary * shape.width)  # the AR's own, no lm_head
    assert bytes_of_weights(tmp_path, "bfloat16", pair.layer + 1) + head == pytest.approx(pair.ar_bytes, rel=1e-4)
    per_token = 2 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    assert shape.bytes_per_token == per_token
