"""The house: floors hold, rooms stay small, `--help` is light, and every setting has its option."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

from deme_cli.app import build
from deme_cli.config import TABLES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deme_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "optuna", "numpy", "scipy",
    "sklearn", "datasets", "matplotlib", "cleanfid", "open_clip", "safetensors", "PIL",
}  # fmt: skip
FLOORS = {
    "diffusion": 1, "data": 1, "training": 2, "sampling": 2, "evaluation": 3, "merging": 4,
    "analysis": 4, "html_report": 4, "comparison": 5, "commands": 6, "app": 7,
    "__main__": 8,
}  # fmt: skip


def floor_of(module: str) -> int:
    """Files at the top of the package are the ground; a folder needs a floor in the plan."""
    room = module.removeprefix("deme_cli").lstrip(".").split(".")[0] or "__init__"
    is_ground = (PACKAGE / f"{room}.py").exists() and room not in FLOORS
    assert is_ground or room in FLOORS, f"{module} is on no floor: add it to the plan"
    return FLOORS.get(room, 0)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Modules imported anywhere in a file, and whether that happens when the file is imported."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, at_import))
        elif isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            at_import = False
        if isinstance(node, ast.stmt | ast.mod | ast.excepthandler):  # others hold no imports
            for child in ast.iter_child_nodes(node):
                visit(child, at_import)

    visit(tree_of(path), True)
    return found


def test_a_file_imports_only_from_its_own_floor_or_below() -> None:
    imports = [(module_of(path), module) for path in FILES for module, _ in imports_of(path)]
    above = [
        f"{importer} imports {module} from above"
        for importer, module in imports
        if module.startswith("deme_cli")
        and floor_of(module) > floor_of(importer)
        and importer != "deme_cli.__init__"  # which hands verbs on, and imports them when asked
    ]
    assert not above
    click = [importer for importer, module in imports if module.split(".")[0] == "click"]
    assert not click, "Typer carries its own click"


def test_files_and_functions_stay_small() -> None:
    lines = {module_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 500} == {}
    long = [
        f"{module_of(path)}:{node.name}"
        for path in FILES
        if path.parent.name != "commands"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - _first(node).lineno >= 60
    ]
    assert not long


def _first(function: ast.FunctionDef) -> ast.stmt:
    """The statement after the docstring."""
    return function.body[1 if ast.get_docstring(function) and len(function.body) > 1 else 0]


def test_the_ground_and_the_commands_import_nothing_heavy() -> None:
    for path in FILES:
        if floor_of(module_of(path)) in (0, 6, 7, 8) and path.parent.name != "comparison":
            for module, at_import in imports_of(path):
                heavy = at_import and module.split(".")[0] in HEAVY
                assert not heavy, f"{module_of(path)} imports {module} when it is imported"


def test_no_circle_of_imports() -> None:
    known = {module_of(path) for path in FILES}
    graph = {
        module_of(path): {m for m, now in imports_of(path) if now and m in known} for path in FILES
    }

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        for other in graph[module]:
            visit(other, (*trail, module))

    for module in graph:
        visit(module, ())


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from deme_cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help_that_ends_with_an_example(deme) -> None:
    listed = re.findall(r"^│ ([a-z-]+) ", deme("--help").stdout, re.MULTILINE)
    commands = [name for name in listed if not name.startswith("-")]
    assert len(commands) >= 12
    for name in commands:
        shown = deme(name, "--help")
        assert shown.exit_code == 0
        assert "Example:" in shown.stdout, name


def test_every_setting_of_finetune_has_an_option_of_its_name_and_help_lists_32_at_most() -> None:
    options = build("finetune").params
    flags = {flag for option in options for flag in option.opts}
    for item in fields(TABLES["finetune"]):
        assert f"--{item.name.replace('_', '-')}" in flags, item.name
    assert sum(not option.hidden for option in options) < 32  # with --help
    assert sum(not option.hidden for option in build("merge").params) < 26 + 1  # and an argument
