"""Models over several devices: what lies where, and that it makes no difference to any number.

There are no GPUs here. The devices are those of tests/pretend_devices.py: values are real, and an operation on tensors of two
devices is refused as between two GPUs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ksweep.activations.hidden_states import BlockReader
from ksweep.autoencoder.nla import models as nla
from ksweep.autoencoder.tae import models as tae
from ksweep.inference import device_map
from ksweep.inference.device_map import Devices, block_map
from ksweep.inference.engine import Request, draw
from ksweep.utils.errors import CheckpointError, RunError
from tests.autoencoder import test_tae_architectures as architectures
from tests.pretend_devices import PretendDevices
from tests.tiny_models import FAMILIES, TinyPair, edit_weights, make_base, make_pair, prefilled

TWO = ("maia:0", "maia:1")
VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
TEXTS = ["a few words", "", "a much longer text than the others, with a second clause"]


@pytest.fixture
def pretend() -> Iterator[None]:
    with PretendDevices():
        yield


def on_meta(num_layers: int) -> Any:
    """A model that has sizes and no values: one block is 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64 weights, an embedding 1000 * 64."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64, intermediate_size=128, num_hidden_layers=num_layers, num_attention_heads=4, vocab_size=1000,
                tie_word_embeddings=False, dtype=torch.float32,
            )
        )  # fmt: skip


BLOCK, EMBEDDING = 4 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64), 4 * 1000 * 64


@pytest.mark.parametrize("num_devices", [2, 3, 4])
def test_blocks_lie_whole_in_order_and_in_about_equal_shares(num_devices: int) -> None:
    model = on_meta(24)
    found = block_map(model, [10**9] * num_devices)
    where = {
        name: next(d for prefix, d in found.items() if f"{name}.".startswith(f"{prefix}."))
        for name, _ in model.named_parameters()
    }
    of_block = [{where[name] for name in where if name.startswith(f"model.layers.{i}.")} for i in range(24)]
    assert all(len(devices) == 1 for devices in of_block)
    order = [devices.pop() for devices in of_block]
    assert order == sorted(order) and set(order) == set(range(num_devices)) and where["model.embed_tokens.weight"] == 0
    held: dict[int, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        held[where[name]] += 4 * parameter.numel()
    mean = (24 * BLOCK + 2 * EMBEDDING + 4 * 64) / num_devices
    assert max(held.values()) < mean + 2 * max(BLOCK, EMBEDDING)


@pytest.mark.parametrize(
    "room",
    [
        [12 * BLOCK, 6 * BLOCK],  # 24 blocks
        [EMBEDDING // 2, 10**9],  # nothing for the first
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_nothing_is_left_to_cpu_or_disk(room: list[int]) -> None:
    with pytest.raises(RunError, match=r"LlamaForCausalLM of 0\.00446 GB does not fit on 2 devices.*gpus_per_model"):
        block_map(on_meta(24), room)


def of_pair(pair: TinyPair, device: Devices) -> tuple[nla.NlaVerbalizer, nla.NlaReconstructor]:
    base = str(pair.base)
    return (
        nla.load_nla_verbalizer(pair.av, base=base, dtype="float32", device=device),
        nla.load_nla_reconstructor(pair.ar, base=base, dtype="float32", device=device),
    )


def drawn(av: Any, vectors: torch.Tensor = VECTORS, max_new_tokens: int = 8) -> dict[tuple[int, int], tuple[int, ...]]:
    """Draws of two groups, the second of which is decoded in two parts, and rows of which leave at different times."""
    requests = [Request(row, 1000 + row, k) for row, count in enumerate((2, 2, 6)) for k in range(count)]
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": max_new_tokens, "seed": 7}
    found = draw(av, vectors, requests, batch_size=4, prefill_batch_size=1, **options)
    return {(d.request.row, d.request.draw): d.token_ids for d in found}


def devices_of(model: Any) -> set[str]:
    return {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.heavy(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "adapters"), [("qwen2", False), ("llama", True), ("gemma3", False), ("gemma3_multimodal", False)]
)
def test_an_nla_pair_over_two_devices_says_and_reads_the_same(family: Any, adapters: bool, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, family, layer=3, num_layers=5, adapters=adapters, talks=family in ("qwen2", "llama"))
    av, ar = of_pair(pair, "cpu")
    texts, vectors = drawn(av), ar.reconstruct_texts(TEXTS)
    with PretendDevices():
        av2, ar2 = of_pair(pair, TWO)
        assert devices_of(av2.model) == devices_of(ar2.model) == set(TWO)
        assert drawn(av2) == texts and torch.equal(ar2.reconstruct_texts(TEXTS), vectors)
    if av.model.config.tie_word_embeddings:
        assert av2.model.get_output_embeddings().weight is av2.model.get_input_embeddings().weight


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where transformers was asked to read weights to; in this thread, as the pretended devices are."""
    asked: list[Any] = []
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_map") != "meta":  # an adapter is laid out there first
            asked.append(kwargs.get("device_map"))
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(noted))
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_weights_of_an_nla_pair_are_read_straight_to_its_gpu(
    tmp_path: Path, streamed: list[Any], monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    pair = make_pair(tmp_path, "llama", layer=3, num_layers=5, adapters=adapters, talks=True)
    av, ar = of_pair(pair, "cpu")
    texts, vectors = drawn(av), ar.reconstruct_texts(TEXTS)
    assert streamed == [None, None]
    with PretendDevices():
        av2, ar2 = of_pair(pair, TWO[0])
        assert streamed[2:] == [{"": "maia:0"}] * 2 and devices_of(av2.model) == devices_of(ar2.model) == {"maia:0"}
        assert drawn(av2) == texts and torch.equal(ar2.reconstruct_texts(TEXTS), vectors)
        # Where a model in float32, to merge an adapter into, does not fit on the GPU, it is read to the host.
        monkeypatch.setattr(device_map, "_free_bytes", lambda device: 1000)
        of_pair(pair, TWO[0])
        assert streamed[4:] == [None, None]


def test_weights_of_a_talkative_autoencoder_and_of_a_base_are_read_straight_to_their_gpu(
    tmp_path: Path, streamed: list[Any]
) -> None:
    info = tae.inspect_tae(architectures.make(tmp_path, architectures.CASES["llama, first 2, nothing left"]))
    base = make_base(tmp_path / "a base", "qwen2", num_layers=3)
    with PretendDevices():
        av = tae.load_tae_verbalizer(info, dtype="float32", device=TWO[0])
        ar = tae.load_tae_reconstructor(info, dtype="float32", device=TWO[0])
        reader = BlockReader(str(base), 1, "float32", TWO[0])
        assert devices_of(av.model) == devices_of(ar.model) == devices_of(reader.decoder) == {"maia:0"}
    assert streamed == [{"": "maia:0"}] * 3


@pytest.mark.heavy(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gpt2, first 2, extra projection, bases stored",
        "gemma2, all",
        "gemma3 in a multimodal wrapper",
        "llama, first 2, nothing left",
        "qwen2, encoder's base stored",
    ],
)
def test_a_talkative_autoencoder_over_two_devices_says_and_reads_the_same(name: str, tmp_path: Path) -> None:
    info = tae.inspect_tae(architectures.make(tmp_path, architectures.CASES[name]))
    positions, tokens = [3, 8, 5], torch.tensor([[5, 9, 11, 2, 7]] * 2)

    def measured(device: Devices, alone: bool) -> Any:
        av = tae.load_tae_verbalizer(info, dtype="float32", device=device)
        ar = tae.load_tae_reconstructor(info, dtype="float32", device=device, sharing=None if alone else av)
        inputs = av.inputs(VECTORS, positions)
        texts = drawn(av, inputs, info.num_tokens)
        return texts, prefilled(av, inputs).logits.cpu(), ar.reconstruct_tokens(tokens, [4, 6], [3, 8]), av, ar

    for alone in (False, True):
        one = measured("cpu", alone)
        with PretendDevices():
            two = measured(TWO, alone)
        assert devices_of(two[3].model) == set(TWO)
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1]) and torch.equal(one[2], two[2])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_over_two_devices_has_the_same_activations(family: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family, num_layers=5)
    ids, positions = [list(range(3, 15)), list(range(20, 27))], [[0, 4, 11], [6]]
    one = BlockReader(str(base), 3, "float32")
    vectors = [one.vectors(ids, positions, pad_id) for pad_id in (None, 5)]
    with PretendDevices():
        two = BlockReader(str(base), 3, "float32", TWO)
        assert devices_of(two.decoder) == set(TWO) and str(next(two.block.parameters()).device) == TWO[1]
        np.testing.assert_array_equal([two.vectors(ids, positions, pad_id) for pad_id in (None, 5)], vectors)


def test_broken_weights_on_the_second_device_are_refused(tmp_path: Path, pretend: None) -> None:
    pair = make_pair(tmp_path, "qwen2", layer=3, num_layers=5)
    edit_weights(pair.av, change=lambda state: state["model.layers.4.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"NaN, infinite or absurdly large.*layers\.4\.mlp\.up_proj"):
        nla.load_nla_verbalizer(pair.av, dtype="float32", device=TWO)


@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: a + b,
        lambda a, b: a @ b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: a[b[0].long()],
        lambda a, b: a.__setitem__(0, b[0]),
        lambda a, b: torch.nn.functional.scaled_dot_product_attention(a[None], a[None], b[None]),
    ],
)
@pytest.mark.parametrize("other", ["maia:1", "cpu"])
def test_pretended_devices_refuse_what_two_gpus_refuse(operation: Callable[..., Any], other: str, pretend: None) -> None:
    mine, theirs = torch.ones(2, 2, device="maia:0"), torch.zeros(2, 2, device=other)
    operation(mine, theirs.to("maia:0"))
    if other == "maia:1" or "long" not in operation.__code__.co_names:  # CPU indices are welcome on a GPU
        with pytest.raises(RuntimeError, match="same device"), torch.inference_mode():
            operation(mine, theirs)


def test_a_full_gpu_counts_as_full_and_not_as_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_map.memory, "free_device_bytes", lambda device: 0 if device.type == "cuda" else None)
    monkeypatch.setattr(device_map.machine, "free_memory", lambda: 1000)
    assert [device_map._free_bytes(torch.device(name)) for name in ("cuda:0", "meta")] == [0, 1000]
