"""Canonical JSON and its fingerprint: the same spec gives the same key in every process, on every machine.

A value without a stable text form (a callable, a set, an object with a default repr) is an error: hashing its `str` would give a
new key in every process, and results would be computed again and again unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any


def canonical_json(value: Any) -> str:
    """Return the canonical text of a spec: keys sorted, no spaces, floats by shortest round trip, dataclasses as objects.

    Raises:
        TypeError: a value without a stable form; the message has its path in the spec.
    """
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the first 128 bits of the SHA-256 of the canonical JSON, as 32 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def json_digest(content: Any) -> str:
    """Return the SHA-256 of what a JSON file says, whatever its order of keys and its spaces; an entry "digest" is left out."""
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{path} is {value}: only finite numbers have an identity")
        # 1 and 1.0 are the same temperature, and an override may spell either.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        if bad := [k for k in value if not isinstance(k, str)]:
            raise TypeError(f"{path} has a key that is not a string: {bad[0]!r}")
        return {k: _plain(v, f"{path}.{k}") for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{path}.{f.name}") for f in fields(value)}
    if isinstance(value, PurePath):
        raise TypeError(f"{path} is a path ({value}): where a file lies is no identity; use the digest of its content")
    raise TypeError(
        f"{path} is a {type(value).__name__}, which has no stable text form; "
        "use strings, numbers, booleans, None, lists, string-keyed mappings or dataclasses of these"
    )
