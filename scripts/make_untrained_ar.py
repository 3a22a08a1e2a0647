"""Write the demo's reconstructor as it is before training: the frozen base with an identity head, in the public layout.

    python scripts/make_untrained_ar.py

The adapter has rank 1 and is all zeros. experiments/checkpoint_sweep.py compares the trained reconstructor with this one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

DEMO = Path(__file__).resolve().parents[1] / "ksweep" / "demo"


def main() -> None:
    trained, target = DEMO / "ar", DEMO / "untrained" / "ar"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)

    adapter = load_file(trained / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(t[:1] if "lora_A" in name else t[:, :1]).contiguous() for name, t in adapter.items()}
    save_file(zero, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((trained / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"r": 1, "lora_alpha": 1}, indent=2) + "\n")

    head = load_file(trained / "value_head.safetensors")["weight"]
    save_file({"weight": torch.eye(len(head), dtype=head.dtype)}, target / "value_head.safetensors")
    sidecar = yaml.safe_load((trained / "nla_meta.yaml").read_text())
    sidecar.pop("training", None)
    sidecar |= {"stage": "init", "created_by": "scripts/make_untrained_ar.py", "trained_on": []}
    (target / "nla_meta.yaml").write_text(yaml.safe_dump(sidecar, allow_unicode=True, sort_keys=False))
    for path in target.iterdir():
        path.chmod(0o644)
        print(path.relative_to(DEMO), path.stat().st_size)


if __name__ == "__main__":
    main()
