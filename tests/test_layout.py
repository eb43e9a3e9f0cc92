"""The walls of the house: who may import whom, what is public, and that each module has its tests."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zipslicer
from zipslicer.backend import Backend

PACKAGE = Path(zipslicer.__file__).parent
TESTS = Path(__file__).parent
FLOORS = [
    "errors", "backend", "policy", "source", "remote", "opening", "archive", "verify", "program", "legacy", "plan", "arrays",
    "composites", "table", "safetensors_file", "dcp_metadata", "dcp_source", "dcp", "lazy", "staging", "reader",
    "tensors", "numpy_tensors", "stream", "prefetch", "notebook", "module", "state_dict", "shards", "joined", "exports",
    "checkpoint", "cli",
]  # fmt: skip
SPECIAL = {"__init__", "__main__", "_version"}
# Only tensors.py is the floor of torch; one other answers with a torch.dtype when asked for one, one copies bytes where NumPy
# is not there to do it, and one fills what is torch's.
TORCH = {"tensors": {"__init__"}, "table": {"dtype"}, "dcp_source": {"_scatter"}, "module": {"load_into"}}
SIDE = {"plan", "arrays"}  # floors that read no file


def modules() -> dict[str, Path]:
    """Module names below the package, with dots, and their files."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else name] = path
    return found


def imports(path: Path) -> list[tuple[str, int, str, str | None]]:
    """(module, level, enclosing function, guard) of each import statement; level 0 is absolute."""
    found: list[tuple[str, int, str, str | None]] = []

    def visit(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            if isinstance(child, ast.Import):
                found.extend((alias.name, 0, function, None) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.module is None:
                    found.extend((alias.name, child.level, function, None) for alias in child.names)
                else:
                    found.append((child.module, child.level, function, None))
            visit(child, inside)

    visit(ast.parse(path.read_text()), "")
    return found


@pytest.mark.parametrize("floor", [name for name in FLOORS if name != "cli"])
def test_a_floor_imports_only_floors_below_it(floor: str) -> None:
    for module, level, _, _ in imports(modules()[floor]):
        if level:
            assert FLOORS.index(module.partition(".")[0]) < FLOORS.index(floor), module
        if level and module == "tensors":
            assert floor in ("module", "state_dict")


def test_every_module_is_on_a_floor() -> None:
    known = {*FLOORS, *SPECIAL, "_pure"}
    assert {name.partition(".")[0] for name in modules()} <= known | side_doors()


def side_doors() -> set[str]:
    """Modules that no floor imports: each may import floors, and no floor may import one."""
    doors = {name for name in modules() if "." not in name} - {*FLOORS, *SPECIAL, "_pure"}
    for floor in FLOORS:
        path = modules()[floor]
        if floor != "cli":
            imported = {module.partition(".")[0] for module, level, _, _ in imports(path) if level}
            assert not doors & imported
    return doors


def test_backends_import_only_errors() -> None:
    inside = {path.stem for path in (PACKAGE / "_pure").glob("*.py")}
    for name, path in modules().items():
        if name.startswith("_pure"):
            for module, level, _, _ in imports(path):
                assert level == 0 or (level == 1 and module in inside) or (level == 2 and module == "errors"), name


def test_own_modules_are_imported_relatively() -> None:
    for name, path in modules().items():
        for module, level, _, _ in imports(path):
            assert level or module.partition(".")[0] != "zipslicer", name


def test_only_tensors_imports_torch() -> None:
    for name in FLOORS:
        for module, level, function, _ in imports(modules()[name]):
            if level == 0 and module.partition(".")[0] == "torch":
                assert function in TORCH.get(name, set()), (name, function)


def test_third_parties_are_imported_inside_functions() -> None:
    for name in FLOORS:
        for module, level, function, _ in imports(modules()[name]):
            if level == 0 and module.partition(".")[0] not in sys.stdlib_module_names:
                assert function, (name, module)


def test_plan_and_arrays_read_no_file() -> None:
    for name in SIDE:
        below = {module for module, level, _, _ in imports(modules()[name]) if level}
        assert not below & {"source", "archive", "backend"}


def test_errors_imports_nothing_of_ours() -> None:
    assert not [module for module, level, _, _ in imports(modules()["errors"]) if level]


def script(name: str) -> Any:
    """A module of docs/."""
    spec = importlib.util.spec_from_file_location(name, TESTS.parent / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
    return made


def test_the_picture_of_the_imports_is_true() -> None:
    drawing = script("imports")
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.drawn(drawing.edges()), "python docs/imports.py"


def test_the_page_of_public_names_is_true() -> None:
    pytest.importorskip("torch.distributed.checkpoint")
    api = script("api")
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), ".venv/bin/python docs/api.py"


def test_public_names() -> None:
    path = modules()["__init__"]
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert set(zipslicer.__all__) == imported
    assert len(set(zipslicer.__all__)) == len(zipslicer.__all__)
    assert all(hasattr(zipslicer, name) for name in zipslicer.__all__)


@pytest.mark.parametrize("name", [*FLOORS, "_pure"])
def test_all_names_what_is_there(name: str) -> None:
    module = importlib.import_module(f"zipslicer.{name}")
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert missing == []
    assert not [public for public in module.__all__ if public.startswith("_")]


def functions_of_backend() -> set[str]:
    return {name for name, value in vars(Backend).items() if inspect.isfunction(value) and not name.startswith("_")}


def test_pure_has_exactly_the_functions_of_backend() -> None:
    pure = importlib.import_module("zipslicer._pure")
    assert set(pure.__all__) == functions_of_backend() | {"name"}


def test_stub_of_native_has_exactly_the_functions_of_backend() -> None:
    stub = ast.parse((PACKAGE / "_native.pyi").read_text())
    assert {node.name for node in stub.body if isinstance(node, ast.FunctionDef)} == functions_of_backend()


def test_native_has_exactly_the_functions_of_its_stub() -> None:
    if importlib.util.find_spec("zipslicer._native") is None:
        assert zipslicer.backend() == "pure"
        return
    native = importlib.import_module("zipslicer._native")
    built = {name for name in dir(native) if not name.startswith("_") and callable(getattr(native, name))}
    assert built == functions_of_backend()
    assert native.name == "native"


def test_signatures_of_the_stub_are_those_of_backend() -> None:
    def signatures(tree: ast.AST) -> dict[str, list[str]]:
        found = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in functions_of_backend():
                found[node.name] = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg != "self"]
        return found

    stub = signatures(ast.parse((PACKAGE / "_native.pyi").read_text()))
    assert stub == signatures(ast.parse((PACKAGE / "backend.py").read_text()))


@pytest.mark.parametrize("name", sorted(name for name in modules() if "." not in name and name not in SPECIAL))
def test_each_module_has_its_tests(name: str) -> None:
    tests = {"_pure": "test_differential.py", "backend": "test_backend.py"}
    assert (TESTS / tests.get(name, f"test_{name}.py")).is_file()


@pytest.mark.parametrize(
    "statement",
    [
        "import zipslicer",
        "import zipslicer; sd = zipslicer.load(sys.argv[1])",
        "import zipslicer; sd = zipslicer.load(sys.argv[1]); list(sd), len(sd), 'w' in sd, sd.get_meta('w'), repr(sd)",
        "import zipslicer; c = zipslicer.open(sys.argv[1]); c.tensors.get_dtype('w'), c.tensors.offset_keys(), repr(c)",
        "import zipslicer; sd = zipslicer.load(sys.argv[1]).rename(str.upper).select('W'); repr(sd), sd._repr_html_()",
        "import zipslicer.cli; zipslicer.cli.main([])",
    ],
)
def test_torch_and_numpy_stay_unimported(statement: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(2), "step": 3, "nested": {"m": torch.zeros(1)}}, path)
    code = f"import sys; {statement}; assert not {{'torch', 'numpy', 'argcomplete', 'tqdm'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
