"""The house: its rooms, that a public name has one home, and that docs/architecture.md speaks of the code as it is."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ksweep"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()

SEVERAL_HOMES = {
    "compare": "users call both: a table of differences (analysis.compare) and its chart (analysis.charts)",
    "main": "the entry point of a command; each module that `python -m` runs has one",
}
"""Public names that two modules define, and why."""


def floors() -> list[list[str]]:
    """The rooms of the import contract, from the top floor down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def public_names(module: Path) -> Iterator[str]:
    """Functions, classes and values that a module defines at its top, without a leading underscore."""
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if not name.startswith("_") and name != "log")


def test_public_names_have_one_home() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module in sorted(PACKAGE.rglob("*.py")):
        for name in dict.fromkeys(public_names(module)):
            homes[name].append(str(module.relative_to(ROOT)))
    twice = {name: places for name, places in homes.items() if len(places) > 1}
    assert {name: places for name, places in twice.items() if name not in SEVERAL_HOMES} == {}
    assert sorted(SEVERAL_HOMES) == sorted(twice), "an exception that is no longer needed"


def test_the_package_has_the_rooms_of_the_contract_and_nothing_else() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert there == {room for rooms in floors() for room in rooms} | {"__init__.py", "py.typed", "demo"}


def test_every_room_says_in_a_sentence_what_is_in_it() -> None:
    for room in (room for rooms in floors() for room in rooms):
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert text and text.partition("\n")[0].endswith("."), room


def test_architecture_has_every_room_on_the_floor_of_the_contract() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", ARCHITECTURE, flags=re.MULTILINE)
    expected = [(str(len(floors()) - number), room) for number, rooms in enumerate(floors()) for room in rooms]
    assert sorted(rows) == sorted(expected)


def test_architecture_and_contributing_name_files_and_functions_that_exist() -> None:
    for document in (ARCHITECTURE, *((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "docs/security.md"))):
        paths = re.findall(r"`((?:\w+/)+\w+\.(?:py|sql|md|svg))(?::(\w+))?", document)
        assert paths
        for path, name in paths:
            file = next((base / path for base in (PACKAGE, ROOT) if (base / path).exists()), None)
            assert file is not None, f"{path} is not there"
            assert not name or re.search(rf"\b(def|class) {name}\b|^{name}\b", file.read_text(), re.MULTILINE), f"{path}:{name}"


def test_architecture_gives_a_reason_for_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [*project["optional-dependencies"]["demo"], *project["optional-dependencies"]["datasets"]]
    names = [re.split(r"[<>=\[ ]", text)[0] for text in (*project["dependencies"], *extras)]
    table = ARCHITECTURE.partition("## Dependencies")[2].partition("## ")[0]
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", table)] == []
