"""Draw the rooms of ksweep/ on their floors and the imports between them, from the code as it is.

    python scripts/draw_rooms.py        # docs/pictures/rooms.svg; what it prints are the same facts in numbers

Floors come from the import contract in pyproject.toml, arrows from the imports themselves (grimp), boxes' texts from the rooms'
docstrings. A line's width grows with the number of imports that it stands for.
"""

from __future__ import annotations

import ast
import math
import tomllib
from collections import Counter
from pathlib import Path

import altair as alt
import grimp

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "rooms.svg"
WIDTH, FLOOR_HEIGHT, BOX_HEIGHT = 1180, 128, 74
COLOURS = [
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#b279a2",
    "#e45756",
    "#72b7b2",
    "#9d755d",
    "#79706e",
    "#eeca3b",
    "#ff9da6",
    "#bab0ac",
]


def floors() -> list[list[str]]:
    """Rooms from the top floor down, as the import contract lists them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def imports_between_rooms() -> Counter[tuple[str, str]]:
    """(importing room, imported room) -> how many modules of one import a module of the other."""
    graph = grimp.build_graph("ksweep")
    counts: Counter[tuple[str, str]] = Counter()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            ends = tuple(name.split(".")[1] if "." in name else "" for name in (importer, imported))
            if ends[0] and ends[1] and ends[0] != ends[1]:
                counts[ends[0], ends[1]] += 1
    return counts


def size_of(room: str) -> tuple[int, int]:
    """(modules, lines) of a room, without those that only hold a docstring."""
    files = [path for path in (ROOT / "ksweep" / room).rglob("*.py") if path.name != "__init__.py"]
    return len(files), sum(len(path.read_text().splitlines()) for path in files)


def purpose_of(room: str) -> str:
    """The first sentence of the room's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / "ksweep" / room / "__init__.py").read_text())) or ""
    return text.partition("\n")[0].strip().rstrip(".")


def wrapped(text: str, width: int) -> list[str]:
    """Text in lines of at most so many characters, two at most."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if len(lines) <= 2 else [lines[0], lines[1][: width - 4] + " ..."]


def picture() -> alt.LayerChart:
    """The rooms as boxes, the imports as lines that all go down."""
    boxes, places = [], {}
    for number, rooms in enumerate(floors()):
        box_width = min(520, (WIDTH - 40 * (len(rooms) + 1)) / len(rooms))
        step = WIDTH / len(rooms)
        for at, room in enumerate(rooms):
            x, y = step * (at + 0.5), FLOOR_HEIGHT * number
            modules, lines = size_of(room)
            places[room] = (x, y)
            boxes.append(
                {
                    "room": room, "x": x - box_width / 2, "x2": x + box_width / 2, "y": y, "y2": y + BOX_HEIGHT, "middle": x,
                    "name_y": y + 16, "size_y": y + BOX_HEIGHT - 10, "text_y": y + 32,
                    "purpose": wrapped(purpose_of(room), int(box_width / 5.6)), "size": f"{modules} modules, {lines:,} lines",
                }
            )  # fmt: skip
    counts = imports_between_rooms()
    arrows = [
        {
            "from": above, "x": places[above][0], "y": places[above][1] + BOX_HEIGHT,
            "x2": places[below][0], "y2": places[below][1],
            "width": 0.6 + math.log2(count), "imports": count,
        }
        for (above, below), count in sorted(counts.items())
    ]  # fmt: skip
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, WIDTH], nice=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[FLOOR_HEIGHT * len(floors()) - 40, -6], nice=False))
    colour = alt.Color("from:N", legend=None, scale=alt.Scale(domain=[r for f in floors() for r in f], range=COLOURS))
    lines_chart = (
        alt.Chart(alt.Data(values=arrows)).mark_rule(opacity=0.45)
        .encode(x=x, y=y, x2="x2:Q", y2="y2:Q", strokeWidth=alt.StrokeWidth("width:Q", scale=None), color=colour)
    )  # fmt: skip
    frame = alt.Chart(alt.Data(values=boxes))
    box = frame.mark_rect(fill="white", stroke="#333", cornerRadius=6).encode(x=x, y=y, x2="x2:Q", y2="y2:Q")
    name = frame.mark_text(fontSize=15, fontWeight="bold").encode(x="middle:Q", y="name_y:Q", text="room:N")
    purpose = frame.mark_text(fontSize=10.5, lineHeight=12, baseline="middle").encode(
        x="middle:Q", y="text_y:Q", text="purpose:N"
    )
    size = frame.mark_text(fontSize=10, color="#666").encode(x="middle:Q", y="size_y:Q", text="size:N")
    return (
        (lines_chart + box + name + purpose + size)
        .properties(
            width=WIDTH, height=FLOOR_HEIGHT * len(floors()) - 34,
            title="ksweep/: rooms on their floors; lines are imports and go down, thicker for more of them",
        )
        .configure_view(strokeWidth=0)
    )  # fmt: skip


def main() -> None:
    PICTURE.parent.mkdir(exist_ok=True)
    picture().save(PICTURE)
    counts = imports_between_rooms()
    floor_of = {room: number for number, rooms in enumerate(floors()) for room in rooms}
    up = [f"{above} -> {below}" for above, below in counts if floor_of[above] >= floor_of[below]]
    arrows = f"{len(counts)} arrows, {len(up)} of them not down"
    print(f"{PICTURE.relative_to(ROOT)}: {len(floors())} floors, {len(floor_of)} rooms, {arrows}")
    for room in floor_of:
        modules, lines = size_of(room)
        print(f"  {room:12} {modules:3} modules {lines:6,} lines")


if __name__ == "__main__":
    main()
