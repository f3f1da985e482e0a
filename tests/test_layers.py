"""Imports point down only (DESIGN.md, section 2), and importing the package costs next to nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "subspace_optim"

# From the ground up. A name is a module or a folder of this package; what shares a name may import each other.
LAYERS = (
    ("_ext",),
    ("philox",),
    ("distributed",),
    ("types", "sizes"),
    ("hyperparameters", "kernels", "kernels.reference"),
    ("storage",),
    ("ops",),
    ("kernels.triton_device",),
    ("kernels.native", "kernels.triton", "kernels.cuda", "kernels.compiled", "kernels.sharded"),
    ("kernels.select",),
    ("projectors", "rules", "groups"),
    ("monitor", "state"),
    ("engine",),
    ("layerwise",),
    ("optimizers", "allocation", "spectrum", "importer"),
    ("planner",),
    ("__init__",),
    ("integrations", "compat"),
    ("pretrain",),
    ("cli", "api_page", "docs"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
USER_LEVEL = LEVEL["integrations"]  # from here on optional packages may be imported
NEEDED = {"torch", "subspace_optim"} | sys.stdlib_module_names
OPTIONAL = {
    "transformers",
    "tokenizers",
    "datasets",
    "matplotlib",
    "rich",
    "accelerate",
    "scipy",
    "pandas",
    "safetensors",
}


def place(*parts):
    """The name in LAYERS that a module of this package goes by; None if it has none."""
    dotted = ".".join(parts) or "__init__"
    return dotted if dotted in LEVEL else parts[0] if parts[0] in LEVEL else None


def unit(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return place(*(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1]))


def imports(path):
    """Every module that a file imports, anywhere in it, by its full name."""
    parts = ("subspace_optim", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: -node.level]) if node.level else ""
            name = ".".join(filter(None, (base, node.module or "")))
            # "from package import name" may import a module or what the package's __init__ defines
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*name.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield f"{name}.{alias.name}" if is_module else name


def own(name):
    """The name in LAYERS of what is imported; None for somebody else's."""
    first, *rest = name.split(".")
    return place(*(rest or ["__init__"])) if first == "subspace_optim" else None


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_layer():
    assert not [path for path in FILES if unit(path) is None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = unit(path)
    targets = {own(name) for name in imports(path)} - {None, here}
    assert not [target for target in targets if LEVEL[target] >= LEVEL[here]]


@pytest.mark.parametrize(
    "path", [p for p in FILES if LEVEL.get(unit(p), 0) < USER_LEVEL], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_library_needs_torch_alone(path):
    """Triton is torch's own companion, and only the kernels may know of it; a budget is what scipy is for."""
    allowed = NEEDED | ({"triton"} if path.parent.name == "kernels" else set())
    allowed |= {"scipy", "numpy"} if path.stem == "allocation" else set()
    assert {name.partition(".")[0] for name in imports(path)} <= allowed


def test_the_walk_sees_what_it_must():
    seen = set(imports(PACKAGE / "engine.py"))
    assert {"subspace_optim.state", "subspace_optim.kernels.select", "torch.linalg"} <= seen
    assert "subspace_optim.engine" in set(imports(PACKAGE / "optimizers" / "galore.py"))


SLOW = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor")
SCRIPT = """
import json, sys
import torch
before = set(sys.modules)
import subspace_optim
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""


def test_importing_the_package_is_quiet_and_loads_little():
    """Nothing but itself and the standard library, CUDA untouched, and none of the parts of torch that load slowly."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    new, cuda = json.loads(done.stdout)
    packages = {name.partition(".")[0] for name in new}
    assert not packages & OPTIONAL
    assert {name for name in packages if not name.startswith("__editable__")} <= NEEDED
    assert not [name for name in new if name.startswith(SLOW)]
    assert not cuda
    assert done.stderr == ""
