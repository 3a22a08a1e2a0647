"""Load the parts that users name in a spec as "package.module:name", and digest them for the keys of what they compute."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ksweep.utils.errors import SpecError

DOTTED_NAME = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


def is_dotted_name(source: str | None) -> bool:
    """Return whether a text has the form "package.module:name"; paths and hub ids do not."""
    return source is not None and DOTTED_NAME.fullmatch(source) is not None and not os.path.exists(source)


def load_named(source: str, field: str, expected: Sequence[str] = ()) -> Any:
    """Return the object that "package.module:name" names. Modules are also looked for in the current directory.

    Args:
        source: the dotted name.
        field: the field of the spec that holds it, for messages.
        expected: attributes and methods that the object must have.

    Raises:
        SpecError: the module cannot be imported, has no such name, or the object lacks something that is expected.
    """
    match = DOTTED_NAME.fullmatch(source)
    if match is None:
        raise SpecError(f"{field}={source!r} is not a dotted name: expected package.module:name, e.g. my_models.readers:WordsAr")
    module = _import(match["module"], f"{field}={source}")
    if not hasattr(module, match["name"]):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise SpecError(
            f"{field}={source}: module {match['module']} ({getattr(module, '__file__', None)}) has no {match['name']!r}; it has "
            f"{', '.join(public[:20]) or 'no public names'}"
        )
    named = getattr(module, match["name"])
    check_has(named, expected, f"{field}={source}")
    return named


def check_has(value: Any, expected: Sequence[str], where: str) -> None:
    """Raise SpecError unless an object has every expected attribute and method."""
    if missing := [name for name in expected if not hasattr(value, name)]:
        raise SpecError(f"{where} has no {', '.join(missing)}; expected {', '.join(expected)} (docs/extending.md)")


def digest_of_named(source: str, named: Any, field: str) -> str:
    """Return what identifies a named part in keys: its attribute `digest`, or without one the digest of its module's source file.

    Raises:
        SpecError: the digest is not a text, or there is neither a digest nor a source file.
    """
    stated = getattr(named, "digest", None)
    if stated is None:
        return source_digest(source, field)
    if not isinstance(stated, str) or not stated:
        raise SpecError(f"{field}={source}: its digest is {stated!r}; expected a text that changes with what the part computes")
    return stated


def source_digest(source: str, field: str) -> str:
    """Return the SHA-256 of the source file of the module of "package.module:name", 32 hex digits.

    Files that the module imports or reads, weights among them, are not covered.
    """
    name = source.partition(":")[0]
    file = getattr(_import(name, f"{field}={source}"), "__file__", None)
    if file is None or not Path(file).is_file():
        raise SpecError(f"{field}={source}: module {name} has no source file to digest. Give the part an attribute `digest`.")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:32]


def _import(name: str, where: str) -> Any:
    """Import a module; the current directory is searched last."""
    here = os.getcwd()
    if not {"", here} & set(sys.path):
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise SpecError(
                f"{where}: module {name} cannot be imported, because it imports {error.name}, which is missing"
            ) from error
        raise SpecError(
            f"{where}: there is no module {error.name!r}. Run the command in the directory that holds it ({here} is searched), "
            "install it, or add its directory to PYTHONPATH."
        ) from error
    except Exception as error:
        raise SpecError(f"{where}: module {name} cannot be imported ({type(error).__name__}: {error})") from error
