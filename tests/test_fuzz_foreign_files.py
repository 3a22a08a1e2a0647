"""Files of somebody else, changed at random: what comes out is a value or an error of ksweep's own, never another exception.

    pytest tests/test_fuzz_foreign_files.py -s                     # some thousand inputs, half a minute
    KSWEEP_TRIALS=50 pytest tests/test_fuzz_foreign_files.py -s    # fifty times as many

Seeded: the same inputs in every run of as many trials. Each test prints how many inputs it tried, how many were refused, and by
how much the memory of the process grew at most, which is limited where the process runs these tests alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from ksweep.activations.datasets import read_documents
from ksweep.activations.vector_source import VectorUnits, read_vectors_sidecar
from ksweep.autoencoder.family import family_of
from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.autoencoder.nla.family import stated_training_norm
from ksweep.autoencoder.tae.checkpoint import inspect_tae
from ksweep.autoencoder.texts_file import read_texts_file
from ksweep.config.spec import Activations
from ksweep.registry.run_record import read_run, write_run
from ksweep.utils.errors import RequestError, RunError, StoreError
from ksweep.utils.files import read_json
from ksweep.utils.tensor_headers import read_header
from ksweep.utils.torch_file import read_checkpoint
from tests.autoencoder import test_tae_crafted_pickles as crafted
from tests.autoencoder.test_lying_headers import with_own_base
from tests.autoencoder.test_tae_refusals import copy_case
from tests.layout_fixtures import CASES
from tests.registry.landed_runs import controls_of, curve_of, record_of, signed
from tests.tiny_models import FIXTURES
from tests.utils.test_tensor_headers import header_of, with_header

pytestmark = [pytest.mark.slow, pytest.mark.trials, pytest.mark.timeout(7200)]

LORA = CASES["easynla lora"]
TRIALS = int(os.environ.get("KSWEEP_TRIALS", "1"))
MOST_GROWTH = 160 << 20
"""Bytes that reading any number of these files may add to the memory of the process; 48 MB of them are a pickle's budget."""


def fuzzed(inputs: int, trial: Callable[[random.Random], None]) -> None:
    """Run a trial `inputs` times TRIALS times, each with chance of its own: the same in every run and process.

    Not Hypothesis: it also tries constants of whatever modules are imported by then.
    """
    for number in range(inputs * TRIALS):
        try:
            trial(random.Random(number))
        except BaseException as error:
            error.add_note(f"with random.Random({number})")
            raise


class Tally:
    """Counts inputs, and lets ksweep's own errors pass."""

    def __init__(self) -> None:
        self.tried = self.refused = 0

    def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.tried += 1
        try:
            return function(*arguments)
        except (RequestError, RunError, StoreError) as error:
            self.refused += 1
            assert str(error) and len(str(error)) < 3000
            str(error).encode()
            return None


def memory_peak() -> int:
    with suppress(OSError, IndexError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
    return 0


@pytest.fixture(scope="module", autouse=True)
def imports(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what reading imports, so that it does not count as growth."""
    inspect_nla(FIXTURES / "qwen2_text" / "nla-av", "av")
    inspect_nla(FIXTURES / "qwen2_text" / "nla-ar", "ar")
    inspect_tae(copy_case("gpt2_patch_all", tmp_path_factory.mktemp("imports")))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, counts = memory_peak(), Tally()
    yield counts
    growth = memory_peak() - before
    print(f"\n{request.node.name}: {counts.tried} inputs, {counts.refused} refused, memory +{growth >> 20} MB at most")
    assert counts.tried >= 100
    # A worker of many tests also grows by what is imported on the way and by garbage of the tests before.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        assert growth < MOST_GROWTH


@contextmanager
def changed(path: Path, data: bytes) -> Iterator[Path]:
    """A file with other content while the body runs; of another time, since readers remember files that have not changed."""
    good = path.read_bytes()
    path.write_bytes(data)
    try:
        yield path
    finally:
        path.write_bytes(good)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut out, doubled, or replaced by others that parsers look at."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(content) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        part = rng.choice((
            bytes(rng.randrange(256) for _ in range(length)), b"\xff" * length, bytes(length), b"",
            content[at : at + length] * 2,
            struct.pack("<Q", rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)))[:length],
            rng.choice((b"[", b"{", b"]", b"}", b'"', b"\\ud800", b"9" * 64, b"*a", b"&a", b"<<: ", b": ", b"\n", b"1e999")),
        ))  # fmt: skip
        content[at : at + rng.choice((0, length))] = part
    return bytes(content)


NUMBERS = [
    -3, -1, 0, 1, 2, 3, 2**31 - 1, 2**31, 2**53, 2**63, -(2**63), 2**64, 2**255, 10**400, -(10**4000), True, False, None,
    0.5, -2.75, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
WORDS = [
    "", "av", "ar", "{", "{explanation}", "\x1b[31m", "\x00", "é" * 500, "a\nb", "../..", "/", "~", "\ud800", "\U0001f600", "12",
    "1e5",
]  # fmt: skip


def any_word(rng: random.Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.7 else "".join(chr(rng.randrange(32, 1 << 15)) for _ in range(rng.randrange(8)))


def any_value(rng: random.Random, depth: int = 3) -> Any:
    """A number, a word, or a list or dictionary of values."""
    kind = rng.random()
    if depth and kind < 0.15:
        return [any_value(rng, depth - 1) for _ in range(rng.randrange(5))]
    if depth and kind < 0.3:
        return {any_word(rng): any_value(rng, depth - 1) for _ in range(rng.randrange(5))}
    return rng.choice(NUMBERS) if kind < 0.7 else any_word(rng)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a tree of dictionaries and lists."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in entries for place in ((*path, key), *places(value, (*path, key)))]


def with_other_value(tree: Any, rng: random.Random) -> Any:
    """A copy with another value at a place, without that place, or with a key more."""
    copy, value = json.loads(json.dumps(tree)), any_value(rng)
    *above, last = rng.choice(places(copy))
    parent = copy
    for key in above:
        parent = parent[key]
    if rng.random() < 0.1:
        del parent[last]
    elif isinstance(parent, dict) and rng.random() < 0.1:
        parent[str(value)[:20]] = value
    else:
        parent[last] = value
    return copy


# the unpickler and what is built on it


def random_pickle(rng: random.Random) -> bytes:
    """Opcodes in an order that makes sense more often than chance would have it."""
    pieces = [*crafted.CARRIED.values(), *(value for value, _ in crafted.REFUSED.values() if len(value) < 2000)]
    atoms = [
        crafted.NONE, crafted.EMPTY_TUPLE, b"]", b"}", b"(", b"K\x05", b"t", b"\x85", b"\x86", b"\x87", b"R", b"\x81",
        b"b", b"a", b"e", b"s", b"u", b"Q", b"h\x00", b"q\x00", b"q\x01", b"h\x01", b"0", b"2",
        crafted.text("storage"),
        crafted.content(9),
        *map(crafted.name, (
            "numpy.dtype", "numpy.ndarray", "torch.FloatStorage", "collections.OrderedDict", "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_tensor_v3", "torch._tensor._rebuild_from_type_v2", "torch.Size", "builtins.set",
            "numpy._core.multiarray.scalar", "torch._utils._rebuild_parameter",
        )),
    ]  # fmt: skip
    return b"".join(rng.choice(atoms if rng.random() < 0.7 else pieces) for _ in range(rng.randrange(1, 20)))


def test_pickles_of_random_opcodes(tally: Tally, tmp_path: Path) -> None:
    def trial(rng: random.Random) -> None:
        tally.read(read_checkpoint, crafted.crafted(tmp_path / "x.pt", crafted.in_dictionary(random_pickle(rng))))

    fuzzed(600, trial)


def test_checkpoint_files_with_changed_bytes(tally: Tally, tmp_path: Path) -> None:
    """Changes of the pickle and of the list of records of a real file, which is then inspected as the launcher does."""
    path = copy_case("gpt2_patch_all", tmp_path)
    good = path.read_bytes()
    pickle_at, list_at = good.index(b"\x80\x02}"), good.index(b"PK\x01\x02")
    pickle_end = good.index(b"PK\x03\x04", pickle_at)

    def trial(rng: random.Random) -> None:
        begin, end = rng.choice(((pickle_at, pickle_end), (list_at, len(good))))
        part = mutated(good[begin:end], rng)
        kept = part[: end - begin].ljust(end - begin, b"\x00") if rng.random() < 0.8 else part  # offsets stay right
        with changed(path, good[:begin] + kept + good[end:]):
            tally.read(inspect_tae, path)

    fuzzed(150, trial)


def test_configurations_of_checkpoints_with_other_values(tally: Tally, tmp_path: Path) -> None:
    """config.json of the base with another value at a random place."""
    path = with_own_base(copy_case("gemma3_patch_two", tmp_path))
    config = inspect_tae(path).base / "config.json"
    good = json.loads(config.read_text())

    def trial(rng: random.Random) -> None:
        with changed(config, json.dumps(with_other_value(good, rng)).encode()):
            tally.read(inspect_tae, path)

    fuzzed(100, trial)


# sidecars, configurations and headers of pairs


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "qwen2_text", tmp_path / "pair"))


@pytest.mark.parametrize("role", ["av", "ar"])
def test_sidecars_with_other_values_and_bytes(role: Any, tally: Tally, pair: Path) -> None:
    path = pair / f"nla-{role}" / "nla_meta.yaml"
    good, of_vectors = path.read_bytes(), pair / "x.nla_meta.yaml"
    tree = json.loads(json.dumps(yaml.safe_load(good)))

    def trial(rng: random.Random) -> None:
        text = yaml.safe_dump(with_other_value(tree, rng)).encode() if rng.random() < 0.5 else mutated(good, rng)
        of_vectors.write_bytes(text.replace(b"nla_model", b"nla_dataset"))
        tally.read(read_vectors_sidecar, pair / "x")
        with changed(path, text):
            tally.read(inspect_nla, path.parent, role)

    fuzzed(100, trial)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "training_report.json"])
def test_json_files_of_a_pair_with_other_values_and_bytes(name: str, tally: Tally, pair: Path) -> None:
    path = pair / name if name == "training_report.json" else pair / "nla-av" / name
    if not path.exists():
        path.write_text('{"held_out": {"activation_norm": 12.5, "fve": 0.5}}')
    good = path.read_bytes()

    def inspect() -> None:
        info = inspect_nla(pair / "nla-av", "av")
        assert info.thinks in (True, False)
        stated_training_norm(info)
        read_json(path, "report")

    def trial(rng: random.Random) -> None:
        other = json.dumps(with_other_value(json.loads(good), rng)).encode() if rng.random() < 0.7 else mutated(good, rng)
        with changed(path, other):
            tally.read(inspect)

    fuzzed(100, trial)


def test_json_files_of_an_easynla_pair_with_other_values_and_bytes(tally: Tally, tmp_path: Path) -> None:
    """ar_meta.json, nla_config.json and the adapter's configuration."""
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    (root / "nla_config.json").write_text(json.dumps({"layer": 2, "d_model": 48, "actor_prompt_ids": [1, 2], "injection": "x"}))
    names = (f"{LORA.ar}/ar_meta.json", "nla_config.json", f"{LORA.av}/adapter_config.json")
    good = {name: (root / name).read_bytes() for name in names}

    def trial(rng: random.Random) -> None:
        name = rng.choice(names)
        other = (
            json.dumps(with_other_value(json.loads(good[name]), rng)).encode() if rng.random() < 0.7 else mutated(good[name], rng)
        )
        with changed(root / name, other):
            tally.read(lambda: family_of(LORA.spec(root)).draws_identity())

    fuzzed(100, trial)


def test_headers_of_weights_with_other_values_and_bytes(tally: Tally, pair: Path) -> None:
    path = pair / "nla-ar" / "model.safetensors"
    good = path.read_bytes()
    header, length = header_of(path), 8 + int.from_bytes(good[:8], "little")

    def trial(rng: random.Random) -> None:
        if rng.random() < 0.5:
            path.write_bytes(mutated(good[:length], rng) + good[length:])
        else:
            path.write_bytes(good)
            with_header(path, lambda _: None, json.dumps(with_other_value(header, rng)).encode())
        tally.read(read_header, path)

    fuzzed(300, trial)


# rows and run records


def test_lines_of_json_with_other_values_and_bytes(tally: Tally, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row: dict[str, Any] = {"text": "a text", "row_id": "row:0", "position": 3, "document": "d", "explanation": "why"}
    row["messages"] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}]

    def trial(rng: random.Random) -> None:
        lines = [json.dumps(row), json.dumps(with_other_value(row, rng)), json.dumps(row)]
        data = "\n".join(lines).encode()
        path.write_bytes(data if rng.random() < 0.6 else mutated(data, rng))
        tally.read(lambda: list(read_documents(Activations(model="m", text=str(path), num_activations=1))))
        tally.read(lambda: list(read_documents(Activations(model="m", text=str(path), text_column="messages"))))
        tally.read(read_texts_file, str(path), "explanation")

    fuzzed(250, trial)


@pytest.mark.parametrize("ending", ["npy", "npz", "safetensors", "pt"])
def test_arrays_of_vectors_with_changed_bytes(tally: Tally, tmp_path: Path, ending: str) -> None:
    path, values = tmp_path / f"v.{ending}", np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    if ending == "npy":
        np.save(path, values)
    elif ending == "npz":
        np.savez_compressed(path, W_dec=values, b_dec=values[0])
    elif ending == "safetensors":
        save_file({"W_dec": torch.tensor(values), "b_dec": torch.tensor(values[0])}, path)
    else:
        torch.save({"W_dec": torch.tensor(values)}, path)
    good = path.read_bytes()

    def trial(rng: random.Random) -> None:
        path.write_bytes(mutated(good, rng))
        tally.read(lambda: list(VectorUnits(Activations(vectors=str(path), num_activations=2)).units([0])))

    fuzzed(120, trial)


def test_run_records_with_other_values_and_bytes(tally: Tally, tmp_path: Path) -> None:
    run = write_run(tmp_path, record_of("r1"), curve_of(), controls_of())
    path = run / "record.json"
    good = path.read_bytes()

    def trial(rng: random.Random) -> None:
        other = mutated(good, rng)
        if rng.random() < 0.6:
            other = signed(with_other_value(json.loads(good), rng)).encode()
        with changed(path, other):
            tally.read(read_run, run)

    fuzzed(150, trial)
