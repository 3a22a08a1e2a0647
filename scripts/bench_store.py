"""How fast is reading the activation store, compared with a pickle of the same tensor and with the raw bytes?

    python scripts/bench_store.py                    # 2 GB of bfloat16, d_model 2048; needs 6.5 GB of disk in --place
    python scripts/bench_store.py --gigabytes 0.2 --repeats 3

Each time is measured in a fresh process, after its imports; the readers alternate. Files are in the page cache (they are read
once before; --place /dev/shm keeps them there on a busy machine). Every reader ends with one array of bfloat16 bits in memory;
`np.fromfile` reads the vectors alone. The first read of a shard in a process verifies its checksum, and "store" includes that;
"store, again" is the second read in the same process. The whole store is opened even where only the first rows are wanted.
Processor seconds are given beside wall-clock seconds, because they vary less on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ksweep.activations import ActivationStore, ActivationUnit

KEY = "0" * 32
FIRST = 1000
READERS = ("np.fromfile", "pickle", "store", "store, again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--rows-per-shard", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--place", type=Path, help="where the files are created; without, a temporary directory")
    parser.add_argument("--measure", nargs=3, metavar=("READER", "ROWS", "WIDTH"), help="one read alone, in this process")
    options = parser.parse_args()
    if options.measure:
        reader, rows, width = options.measure
        print(*measure(options.place, reader, int(rows), int(width)))
        return
    place = Path(tempfile.mkdtemp(prefix="bench-store-", dir=options.place))
    try:
        rows = int(options.gigabytes * 1e9 / 2 / options.d_model)
        make_files(place, rows, options.d_model, options.rows_per_shard)
        report(place, rows, options)
    finally:
        shutil.rmtree(place)


def make_files(place: Path, rows: int, width: int, rows_per_shard: int) -> None:
    """Write the same vectors to a store, as a pickled tensor, and as raw bytes."""
    import torch

    bits = np.random.default_rng(0).integers(0, 2**16, (rows, width), dtype=np.uint16) & 0xBFFF  # finite values only
    store = ActivationStore(place / "cache", KEY, {"kind": "bench"})
    began = time.perf_counter()
    for index, start in enumerate(range(0, rows, rows_per_shard)):
        part = bits[start : start + rows_per_shard]
        store.write_unit(index, unit(part, start, start + len(part) == rows), "bfloat16")
    print(f"written: {bits.nbytes / 1e9:.2f} GB in {index + 1} shards, {time.perf_counter() - began:.1f} s with every fsync")
    store.write_manifest()
    bits.tofile(place / "raw")
    with (place / "pickle").open("wb") as file:
        pickle.dump(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), file, protocol=5)


def unit(vectors: np.ndarray, first: int, is_last: bool) -> ActivationUnit:
    n = len(vectors)
    names = [f"row:{first + i}" for i in range(n)]
    return ActivationUnit(
        vectors=vectors,
        row_ids=names,
        documents=names,
        positions=list(range(n)),
        token_ids=list(range(n)),
        windows=["about two hundred characters of text up to and including the position; " * 3] * n,
        num_rows=n,
        num_skipped=0,
        is_last=is_last,
    )


def measure(place: Path, reader: str, rows: int, width: int) -> tuple[float, float]:
    """Return wall-clock and processor seconds until the first rows are in memory, in this process."""
    if reader == "pickle":
        import torch  # noqa: F401  # loading a tensor needs it: not part of the time
    if reader == "store, again":
        read(place, "store", rows, width)
    began, worked = time.perf_counter(), time.process_time()
    found = read(place, reader, rows, width)
    seconds = time.perf_counter() - began, time.process_time() - worked
    assert found.shape == (rows, width)
    return seconds


def read(place: Path, reader: str, rows: int, width: int) -> np.ndarray:
    if reader == "np.fromfile":
        return np.fromfile(place / "raw", dtype=np.uint16, count=rows * width).reshape(-1, width)
    if reader == "pickle":
        import torch

        with (place / "pickle").open("rb") as file:
            tensor = pickle.load(file)  # all of it, however few rows are wanted
        return np.asarray(tensor[:rows].view(torch.int16).numpy()).view(np.uint16)
    table = ActivationStore(place / "cache", KEY, {}).open((place / "raw").stat().st_size // (2 * width))
    out, at = np.empty((rows, width), dtype=np.uint16), 0
    for part in table.stored(0, rows):
        out[at : at + len(part)] = part
        at += len(part)
    return out


def report(place: Path, rows: int, options: argparse.Namespace) -> None:
    os.sync()
    for path in place.rglob("*"):  # into the page cache
        if path.is_file():
            path.read_bytes()
    times: dict[tuple[str, int], list[tuple[float, float]]] = {(reader, n): [] for n in (FIRST, rows) for reader in READERS}
    for _ in range(options.repeats):
        for reader, n in times:
            arguments = ["--place", str(place), "--measure", reader, str(n), str(options.d_model)]
            done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
            wall, processor = map(float, done.stdout.split())
            times[reader, n].append((wall, processor))
    print(f"medians of {options.repeats} (wall clock: smallest to largest); page cache warm; ratios are medians of ratios")
    print(f"{'':16}{'wall clock, s':>30}{'processor, s':>16}   ratio wall / processor")
    for n, against in ((FIRST, "pickle"), (rows, "np.fromfile")):
        print(f"first {n:,} rows, against {against}" if n < rows else f"all {n:,} rows, against {against}")
        for reader in READERS:
            found, others = np.array(times[reader, n]), np.array(times[against, n])
            wall, processor = np.median(found, axis=0)
            spread = f"{wall:.4f} ({found[:, 0].min():.4f} to {found[:, 0].max():.4f})"
            ratio = " / ".join(times_or_part(r) for r in np.median(found / others, axis=0))
            print(f"  {reader:<14}{spread:>30}{processor:16.4f}   {ratio}")


def times_or_part(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio > 0.1 else f"1/{1 / ratio:.0f}"


if __name__ == "__main__":
    main()
