"""The house: a room imports only from the floors below it, and each heavy library has its one room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = {
    "orchestrator.cli": 6,
    "orchestrator.__main__": 7,
    "orchestrator.launch": 5,
    "orchestrator.show": 5,
    "orchestrator.run": 4,
    "orchestrator.data": 3,
    "orchestrator.transfer": 3,
    "orchestrator.search": 3,
    "orchestrator.pipeline": 2,
    "orchestrator.job": 2,
    "orchestrator.errors": 1,
    "orchestrator.examples": 1,
    "orchestrator.parser": 3,
    "orchestrator.storage": 1,
    "hff": 1,
}
# Which rooms may import what is heavy.
HEAVY = {
    "ray": {"orchestrator.launch"},
    "mlflow": {"orchestrator.run"},
    "webdataset": {"orchestrator.data"},
    "PIL": {"orchestrator.data"},
    "obstore": {"orchestrator.data"},
    "simplejpeg": {"orchestrator.data"},
    "sklearn": {"orchestrator.data", "orchestrator.search"},
    "optuna": {"orchestrator.search"},
    "rich": {"orchestrator.show"},
    "pydantic": {"orchestrator.job"},
    "timm": {"orchestrator.transfer"},
    "shtab": {"orchestrator.show"},
}
MODULES = sorted([*(ROOT / "hff").rglob("*.py"), *(ROOT / "orchestrator").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    return next((r for r in FLOORS if module == r or module.startswith(r + ".")), None)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_room_imports_only_from_floors_below(path: Path) -> None:
    own = room(module_name(path))
    for name in imports(path):
        other = room(name)
        if own is None or other is None or own == other:
            continue
        # launch/ shows what it does through show/; show/ never launches.
        if (own, other) == ("orchestrator.launch", "orchestrator.show"):
            continue
        assert FLOORS[other] < FLOORS[own], f"{own} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_hff_knows_torch_alone_and_heavy_libraries_have_one_room(path: Path) -> None:
    own = room(module_name(path))
    for name in imports(path):
        top = name.split(".")[0]
        if own == "hff":
            assert top not in ("orchestrator", "ray", "mlflow", "webdataset", "timm", "pydantic", "yaml", "PIL")
        if top in HEAVY:
            assert own in HEAVY[top] or (top == "rich" and own == "orchestrator.show"), f"{own} imports {name}"


def test_a_worker_and_a_driver_import_nothing_heavy_that_their_job_may_not_need() -> None:
    """Each of these takes a worker seconds and some 100 MB; a run that needs one imports it where it is used."""
    code = (
        "import sys, orchestrator.launch.driver; "
        "heavy = 'mlflow pandas sklearn scipy timm torchvision ray optuna onnx sqlalchemy sympy triton torch._dynamo'; "
        "sys.exit(', '.join(sorted(set(heavy.split()) & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_do_not_import_one_another_in_circles() -> None:
    known = {module_name(p): p for p in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text())
        # Only what is imported at load time can make a circle; functions and type checks import later.
        found = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in known else node.module)
        graph[name] = found & known.keys() - {name}
    seen: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if seen.get(name):
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        seen[name] = 1

    for name in graph:
        visit(name, ())


def test_no_module_is_longer_than_400_lines() -> None:
    long = [f"{module_name(p)}: {n}" for p in MODULES if (n := len(p.read_text().splitlines())) > 400]
    assert not long
