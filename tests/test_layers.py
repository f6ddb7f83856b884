"""Imports point down the layers, and importing us stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"llama4_lab": ROOT / "llama4_lab", "llama4_widgets": ROOT / "widgets/llama4_widgets"}

# From top to bottom. A module imports from lines below its own and from its own package.
# `llama4_lab` alone is the public face, which gathers what lies below it.
LAYERS = [
    "llama4_widgets",
    "llama4_lab.cli",
    "llama4_lab.commands",
    "llama4_lab.opening",
    "llama4_lab",
    "llama4_lab.train llama4_lab.bench llama4_lab.trace_report",
    "llama4_lab.analysis",
    "llama4_lab.generate llama4_lab.parallel",
    "llama4_lab.replay",
    "llama4_lab.edits",
    "llama4_lab.trace",
    "llama4_lab.points_page llama4_lab.plan_page",
    "llama4_lab.witness llama4_lab.spill llama4_lab.aliases",
    "llama4_lab.checkpoint",
    "llama4_lab.prompt",
    "llama4_lab.model",
    "llama4_lab.experts",
    "llama4_lab.cache",
    "llama4_lab.plan",
    "llama4_lab.points llama4_lab.packed",
    "llama4_lab.packed_kernels llama4_lab.packed_triton llama4_lab.plain_kernels llama4_lab.tile",
    "llama4_lab.compiled",
    "llama4_lab.config llama4_lab.hardware llama4_lab.loading llama4_lab.precision",
]
# The modules of the widgets that ask a model; the others draw, and need no torch.
COMPUTE = tuple(
    f"llama4_widgets.{name}"
    for name in ("explore", "moment", "app", "bar", "keeping", "patterns", "views")
)
LINE = {name: line for line, names in enumerate(LAYERS) for name in names.split()}


def modules() -> dict[str, Path]:
    """Every module of ours, by dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def layer(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to."""
    for name in LINE:
        if module == name or (name != "llama4_lab" and module.startswith(f"{name}.")):
            return name
    raise AssertionError(f"{module} has no layer: put it into LAYERS and the design's picture")


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Yield the modules of ours that a tree imports at run time, also inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in inner]
        else:
            yield from imports(node, module, is_package)
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def upward_imports(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return the imports that do not point down."""
    own = layer(module)
    targets = {name: layer(name) for name in imports(ast.parse(source), module, is_package)}
    return [name for name, target in targets.items() if target != own and LINE[target] <= LINE[own]]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    path = MODULES[module]
    wrong = upward_imports(module, path.read_text(), path.name == "__init__.py")
    assert not wrong, f"{module} imports {wrong}, which does not lie below it in LAYERS"


@pytest.mark.parametrize(
    ("module", "line", "is_right"),
    [
        ("llama4_lab.trace", "from llama4_lab.model import Llama4", True),
        ("llama4_lab.model.text", "from .norm import RMSNorm", True),
        ("llama4_lab.model.text", "from ..config import Llama4Config", True),
        ("llama4_lab.model.text", "from ..trace import points", False),
        ("llama4_lab.model.text", "def f():\n    import llama4_lab.prompt.chat", False),
        ("llama4_lab.model.text", "import llama4_lab", False),
        ("llama4_lab.trace", "from llama4_lab.edits import points", False),
        ("llama4_lab.cli", "import llama4_widgets.board", False),
        ("llama4_widgets.explore", "import llama4_lab", True),
        ("llama4_lab", "import llama4_widgets", False),
    ],
)
def test_an_import_that_points_up_is_found(module, line, is_right):
    assert (not upward_imports(module, line)) == is_right


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_llama4_lab_stays_light():
    heavy = "captum numba plotly triton transformers matplotlib ipywidgets"
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import llama4_lab; print(*set(sys.argv[1:]) & (set(sys.modules) - before))"
    )
    assert run(code, *heavy.split()).split() == []


def test_modules_are_imported_when_they_are_named():
    code = (
        "import sys, llama4_lab as l4; print('llama4_lab.analysis.lens' in sys.modules)\n"
        "print(l4.analysis.lens.logit_lens.__name__, l4.train.scenes.sample.__name__)\n"
        "for ask in (lambda: l4.analysis.lends, lambda: l4.analyses):\n"
        "    try: ask()\n"
        "    except AttributeError as error: print(error)"
    )
    assert run(code).splitlines() == [
        "False",
        "logit_lens sample",
        "module 'llama4_lab.analysis' has no attribute 'lends'",
        "module 'llama4_lab' has no attribute 'analyses'",
    ]


def test_drawing_modules_import_without_torch():
    drawing = sorted(name for name in MODULES if name.startswith("llama4_widgets"))
    drawing = [name for name in drawing if not name.startswith(COMPUTE)]
    code = (
        "import importlib, sys; sys.modules['torch'] = None  # importing it raises ImportError\n"
        "for name in sys.argv[1:]: importlib.import_module(name)"
    )
    run(code, *drawing)
