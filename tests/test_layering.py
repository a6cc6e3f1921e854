"""Who may import whom, read from the syntax trees: the layers of the project."""

import ast
from graphlib import TopologicalSorter
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
RANKS = "version solution solvers.base fixed_point solvers jacobian gradients dropout equilibrium hooks".split()
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
FLOORS = {
    "moments": set(),
    "hooks": {"moments"},
    "measures": {"moments"},
    "report": {"moments", "measures"},
    "plots": {"measures", "report"},
    "probe": {"moments", "hooks", "measures", "report"},
}


def test_nc_probe_has_floors():
    graph = {}
    for path in files(["nc_probe"]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {name for name in imports(path) if name.startswith("nc_probe")}
        if module != "nc_probe":
            floor = module.split(".")[1]
            above = {name.split(".")[1] for name in graph[module]} - FLOORS[floor] - {floor}
            assert not above, f"{module} imports {above}"
    assert set(FLOORS) == {name.split(".")[1] for name in graph if name != "nc_probe"}
    TopologicalSorter(graph).prepare()  # raises where modules import each other in a circle


def test_no_script_hides_a_package():
    names = {p.stem for p in (ROOT / "recipes").glob("*.py")}
    assert not names & {"datasets", "types", "accelerate", "timm", "torch", "yaml", "copy", "random"}


def test_no_file_is_a_drawer():
    for package in ("timm_deq", "nc_probe", "recipes"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.stem not in {"utils", "common", "helpers", "misc"}, path
            most = 400 if path.parent.name == "models" else 330
            assert len(path.read_text().splitlines()) <= most, path
