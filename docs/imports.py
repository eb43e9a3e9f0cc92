"""Draw who imports whom in zipslicer/, out of the import statements themselves: docs/pictures/imports.svg.

    python docs/imports.py            draw it; an import that closes a circle is an error, for then no order has all arrows down
    python docs/imports.py --list     one line for each import instead: importer, imported, and "late" if a function does it

Needs nothing but Python. A module stands above all that it imports. An import that is there by way of others, too, is drawn
faintly; one that waits until a function is called, or that is for types only, is dashed.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import html
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "zipslicer"
PICTURE = ROOT / "docs" / "pictures" / "imports.svg"
GROUPS = ("cli", "_pure")  # folders that are one box each

WIDTH, ROW, BOX, LETTER = 1180, 62, 24, 7.3  # pixels

Edges = dict[tuple[str, str], bool]  # (importer, imported) -> whether it is late


def edges() -> Edges:
    """Of all import statements; what is imported both early and late is early."""
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    modules = {
        parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts: path for parts, path in files.items()
    }
    found: Edges = {}
    for name, path in modules.items():
        folder = name if path.name == "__init__.py" and name != ("__init__",) else name[:-1]
        for node, is_late in _imports(ast.parse(path.read_text(encoding="utf-8")), False):
            base = folder[: len(folder) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
            wanted = [base] if base in modules else [(*base, alias.name) for alias in node.names]
            for one in wanted:
                importer, imported = _box(name), _box(one if one in modules else ("__init__",))
                if importer != imported:
                    found[importer, imported] = is_late and found.get((importer, imported), True)
    return found


def _imports(node: ast.AST, is_late: bool) -> Iterator[tuple[ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.level:
            yield child, is_late
        waits = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        types = isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
        yield from _imports(child, is_late or waits or types)


def _box(name: tuple[str, ...]) -> str:
    return name[0] if name[0] in GROUPS else ".".join(name)


def floors(found: Edges) -> list[list[str]]:
    """Boxes from the ground up: each on the lowest floor that is above all that it imports."""
    below: dict[str, set[str]] = {}
    for importer, imported in found:
        below.setdefault(importer, set()).add(imported)
    height: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(below).static_order():  # raises CycleError
        height[name] = 1 + max((height[each] for each in below.get(name, ())), default=-1)
    rows: list[list[str]] = [[] for _ in range(1 + max(height.values()))]
    for name in sorted(height):
        rows[height[name]].append(name)
    return rows


def places(rows: list[list[str]], found: Edges) -> dict[str, tuple[float, float]]:
    """The middle of each box. Who hangs together stands together: each goes, by turns, to the mean of its neighbours."""
    x = {name: (i + 1) / (len(row) + 1) for row in rows for i, name in enumerate(row)}
    for _ in range(60):
        for row in rows:
            wish = {}
            for name in row:
                near = [x[b] for a, b in found if a == name] + [x[a] for a, b in found if b == name]
                wish[name] = sum(near) / len(near)
            row.sort(key=wish.__getitem__)
            room = sum(_width(name) for name in row)
            gap, at = (WIDTH - room) / (len(row) + 1), 0.0
            for name in row:
                at += gap + _width(name) / 2
                x[name] = at / WIDTH
                at += _width(name) / 2
    return {name: (x[name] * WIDTH, (len(rows) - i - 0.5) * ROW) for i, row in enumerate(rows) for name in row}


def _width(name: str) -> float:
    return LETTER * len(name) + 16


def drawn(found: Edges) -> str:
    """The picture, as SVG that is read on white and on black."""
    rows = floors(found)
    at = places(rows, found)
    reached: dict[str, set[str]] = {}  # by way of others
    for row in rows:
        for name in row:
            direct = {b for a, b in found if a == name}
            reached[name] = set().union(*({*reached[b], b} for b in direct))
    lines, boxes = [], []
    for (a, b), is_late in sorted(found.items(), key=str):
        (x1, y1), (x2, y2) = at[a], at[b]
        y1, y2 = y1 + BOX / 2, y2 - BOX / 2
        is_told = any(b in reached[c] for d, c in found if d == a)
        style = 'opacity="0.13"' if is_told else 'opacity="0.75" marker-end="url(#head)"'
        style += ' stroke-dasharray="4 3"' if is_late else ""
        bend = (y2 - y1) / 2
        lines.append(
            f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}" {style}/>'
        )
    for name, (x, y) in at.items():
        wide = _width(name)
        boxes.append(f'<rect x="{x - wide / 2:.0f}" y="{y - BOX / 2:.0f}" width="{wide:.0f}" height="{BOX}" rx="4"/>')
        boxes.append(f'<text x="{x:.0f}" y="{y + 4:.0f}">{html.escape(name)}</text>')
    high = len(rows) * ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" font-family="monospace" font-size="12">'
        f'<rect width="{WIDTH}" height="{high}" fill="#fff"/>'
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 1L8 4L0 7z" fill="#00695c"/></marker>'
        f'<g fill="none" stroke="#00695c" stroke-width="1">{"".join(lines)}</g>'
        f'<g fill="#e0f2f1" stroke="#00695c" text-anchor="middle">{"".join(b for b in boxes if b.startswith("<rect"))}</g>'
        f'<g fill="#111" text-anchor="middle">{"".join(b for b in boxes if b.startswith("<text"))}</g></svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the imports, and draw nothing")
    found = edges()
    if parser.parse_args().list:
        print("\n".join(f"{a} {b}{' late' * late}" for (a, b), late in sorted(found.items())))
    else:
        PICTURE.write_text(drawn(found), encoding="utf-8")


if __name__ == "__main__":
    main()
