"""The label of a part: which keys its rows belong to, and digests of its columns, in the metadata of its Parquet schema."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

LABEL = b"ksweep"


@dataclass(frozen=True, kw_only=True)
class PartLabel:
    """What a part says about itself."""

    keys: Mapping[str, str]
    """Keys of its store: draws, and for scores also scores."""
    columns: Mapping[str, str]
    """Digest of each column. One for each, so that reading some columns checks those."""
    scored: str | None = None
    """For scores: digest of the draws part whose texts were scored."""

    @property
    def digest(self) -> str:
        """Digest of the part's content."""
        return hashlib.sha256(json.dumps(self.columns, sort_keys=True).encode()).hexdigest()[:32]

    def mismatch(self, table: pa.Table, keys: Mapping[str, str]) -> str | None:
        """Return how a part in the directory of `keys`, or the columns read from it, contradict its label; None if they agree."""
        if dict(self.keys) != dict(keys):
            return f"it was written for {_listed(self.keys)} and lies in the directory of {_listed(keys)}"
        for name in table.column_names:
            if name in self.columns and column_digest(table[name]) != self.columns[name]:
                return f"the digest of its column {name} is another than its label says"
        return None


def label_of(table: pa.Table, keys: Mapping[str, str], columns: Iterable[str], scored: str | None = None) -> PartLabel:
    """Return the label of a table with digests of these columns."""
    return PartLabel(keys=keys, columns={name: column_digest(table[name]) for name in columns}, scored=scored)


def labelled(table: pa.Table, label: PartLabel) -> pa.Table:
    """Return the table with the label in its metadata."""
    return table.replace_schema_metadata({LABEL: json.dumps(asdict(label), sort_keys=True)})


def read_label(schema: pa.Schema) -> PartLabel | None:
    """Return the label in a schema's metadata; None where there is none, as in parts of earlier versions.

    Raises:
        ValueError: what is there is no label.
    """
    text = (schema.metadata or {}).get(LABEL)
    if text is None:
        return None
    try:
        return PartLabel(**json.loads(text))
    except TypeError as error:
        raise ValueError(f"its label cannot be read ({error})") from error


def column_digest(column: pa.ChunkedArray) -> str:
    """Return a digest of a column's values, which does not depend on how they are stored or chunked."""
    digest = xxhash.xxh3_128()
    _add(digest, column.combine_chunks())
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_128, array: pa.Array) -> None:
    digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_list(array.type):
        _add_numbers(digest, pc.list_value_length(array))
        _add(digest, array.flatten())
    elif pa.types.is_string(array.type):
        _add_numbers(digest, pc.binary_length(array))
        digest.update(b"".join(array.cast(pa.binary()).drop_null().to_pylist()))
    else:
        _add_numbers(digest, array)


def _add_numbers(digest: xxhash.xxh3_128, array: pa.Array) -> None:
    digest.update(pc.fill_null(array, 0).to_numpy(zero_copy_only=False).tobytes())


def _listed(keys: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {key[:8]}" for name, key in keys.items())
