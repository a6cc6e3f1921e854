"""Who may import whom, read from the syntax trees: the layers of the project."""

import ast
import graphlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"accelerate", "datasets", "huggingface_hub", "jsonargparse", "sklearn"}

# Each layer: its files, and the packages that it must not import.
LAYERS = {
    "core": (["timm_deq/*.py", "timm_deq/solvers", "timm_deq/gradients"], {"timm", "nc_probe", "recipes", *HEAVY}),
    "models": (["timm_deq/models"], {"nc_probe", "recipes", *HEAVY}),
    "nc_probe": (["nc_probe"], {"timm", "timm_deq", "recipes", *HEAVY}),
}

# Inside the core: a module may import those of its own rank or below.
RANKS = "version transforms solution solvers.base layout fixed_point solvers jacobian parametrized".split()
RANKS += "dropout bound_cell gradients equilibrium hooks".split()
RANKS += "spectral monotone warm_start correction log models".split() + [""]


def files(patterns):
    for pattern in patterns:
        yield from (ROOT / pattern).rglob("*.py") if "*" not in pattern else ROOT.glob(pattern)


def imports(path):
    """Every module named in an import statement of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("layer", LAYERS)
def test_packages(layer):
    patterns, forbidden = LAYERS[layer]
    found = list(files(patterns))
    assert found
    for path in found:
        assert not {name.split(".")[0] for name in imports(path)} & forbidden, path


def rank(module):
    inner = module.removeprefix("timm_deq").removeprefix(".")
    return next(i for i, prefix in enumerate(RANKS) if inner == prefix or (prefix and inner.startswith(prefix + ".")))


def test_the_core_is_ordered():
    for path in files(["timm_deq"]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name in imports(path):
            if name.startswith("timm_deq"):
                assert rank(name) <= rank(module), f"{module} imports {name}"


# Inside nc_probe: each folder or file at its root, and those from which it may import.
NC_PROBE_FLOORS = {
    "moments": set(),
    "hooks": {"moments"},
    "measures": {"moments"},
    "output": set(),
    "report": {"moments", "measures", "output"},
    "plots": {"moments", "measures", "output", "report"},
    "place_sums": {"moments", "hooks", "measures", "report"},
    "pass_sums": {"moments", "hooks", "measures", "report", "place_sums"},
    "probe": {"moments", "hooks", "measures", "report", "pass_sums"},
    "loops": {"moments", "hooks", "report", "probe", "ood"},
    "integrations": {"moments", "report", "loops"},
    "ood": {"moments", "measures", "probe"},
}


def test_nc_probe_has_floors():
    graph = {}
    for path in files(["nc_probe"]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {name for name in imports(path) if name.startswith("nc_probe")}
        if module != "nc_probe":
            floor = module.split(".")[1]
            above = {name.split(".")[1] for name in graph[module]} - NC_PROBE_FLOORS[floor] - {floor}
            assert not above, f"{module} imports {above}"
    assert set(NC_PROBE_FLOORS) == {name.split(".")[1] for name in graph if name != "nc_probe"}
    graphlib.TopologicalSorter(graph).prepare()  # raises where modules import each other in a circle


def test_training_loops_of_others_are_imported_by_their_own_modules():
    loops = {"transformers", "lightning", "pytorch_lightning"}
    for path in files(["nc_probe"]):
        own = {path.stem} if path.parent.name == "integrations" else set()
        assert not {name.split(".")[0] for name in imports(path)} & loops - own, path


# Inside recipes: a floor may import those before it, and the files of a folder one another; commands stand last.
FLOORS = [{"errors"}, {"results"}, {"imbalance"}, {"settings", "images"}, {"training"}, {"benchmarks"}]


def recipe_modules():
    """The modules of recipes, each with the modules of recipes that it imports, anywhere in the file."""
    found = {}
    for path in files(["recipes"]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name.startswith("recipes.")}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "recipes":
                # `from recipes.benchmarks import solvers` names a module too
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                inner = {name for name in inner if (ROOT / Path(*name.split("."))).with_suffix(".py").exists()}
                found[module] |= inner or {node.module}
    return found


def floor(module):
    """The floor of a module of recipes, from the ground; the commands are above all."""
    _, name, *_ = *module.split("."), "", ""
    return next((i for i, names in enumerate(FLOORS) if name in names), len(FLOORS))


def test_recipes_stand_on_floors():
    modules = recipe_modules()
    for module, imported in modules.items():
        for name in imported:
            folders = module.split(".")[1], name.split(".")[1]
            assert floor(name) < floor(module) or folders[0] == folders[1], f"{module} imports {name}"


def test_no_command_imports_another():
    for module, imported in recipe_modules().items():
        commands = {name for name in imported if floor(name) == len(FLOORS)}
        assert not commands, f"{module} imports {commands}"


def test_recipes_import_in_no_circle():
    graphlib.TopologicalSorter(recipe_modules()).prepare()  # raises CycleError


def test_only_commands_lie_at_the_root_of_recipes():
    files_there = {"errors.py", "py.typed", "LOG.md", "README.md", "__init__.py"}
    for path in (ROOT / "recipes").iterdir():
        if path.is_file() and path.name not in files_there:
            assert path.suffix == ".py" and "def main(" in path.read_text(), path
        if path.is_dir() and path.name != "__pycache__":
            assert path.name == "presets" or any(path.name in names for names in FLOORS), path


def test_nothing_at_the_root_of_recipes_hides_a_package():
    """Launching a command by its path puts recipes/ first on sys.path."""
    installed = {name.split(".")[0] for name in importlib.metadata.packages_distributions()} | sys.stdlib_module_names
    for path in (ROOT / "recipes").iterdir():
        if path.is_dir() or path.suffix == ".py":
            assert path.stem not in installed or path.stem.startswith("__"), path


def functions():
    """Every function of the packages, with its name and file."""
    for package in ("timm_deq", "nc_probe", "recipes"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{path.relative_to(ROOT)}: {node.name}", node


def test_every_function_fits_one_screen():
    for name, node in functions():
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        assert lines <= 80, f"{name} has {lines} lines"


BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def depth(node):
    """How deep blocks stand in one another below a node; an `elif` is as deep as its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        own = isinstance(child, BLOCKS)
        if isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]:
            own = False
        deepest = max(deepest, own + depth(child))
    return deepest


def test_no_block_stands_deeper_than_four():
    for name, node in functions():
        assert depth(node) <= 4, f"{name} is {depth(node)} blocks deep"


def test_no_file_is_a_drawer():
    for package in ("timm_deq", "nc_probe", "recipes"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.stem not in {"utils", "common", "helpers", "misc"}, path
            most = 400 if path.parent.name == "models" else 330
            assert len(path.read_text().splitlines()) <= most, path
