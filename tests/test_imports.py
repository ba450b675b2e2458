"""The order of the wings, read from the source: a module imports only from its own floor or below.

An import inside a function counts too. House and order are described in CONTRIBUTING.md.
"""

import ast
from pathlib import Path

import kd_jax

ROOT = Path(kd_jax.__file__).parent
# Floors from the ground up. Wings on one floor do not import each other.
FLOORS = (
    ("storage",),
    ("parallel", "metrics"),
    ("losses", "runs"),
    ("fused", "reporting"),
    ("lm.model", "gmm.mixture", "gmm.sums"),
    ("lm.weights", "lm.score", "lm.sampler_spec", "gmm.kmeans", "gmm.gradient_fit", "gmm.sweep"),
    ("lm.corpus", "gmm.em"),
    ("lm.decode", "gmm.specs", "gmm.students"),
    ("lm.distill", "lm.evaluation", "gmm.findings"),
    ("lm.training", "lm.instruct", "gmm.experiment"),
    ("lm.experiment", "gmm.frontier"),
    ("lm.report", "gmm.report"),
    ("report",),
    ("train", "evaluate", "sample", "teacher", "compare", "export", "corpus"),
    ("sweep",),
    ("__main__",),
)
FLOOR = {f"kd_jax.{wing}": number for number, floor in enumerate(FLOORS) for wing in floor}


def module_name(path):
    parts = ("kd_jax", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """The kd_jax modules a file names in its imports, `from a import b` as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for module in found if module.startswith("kd_jax.")}


MODULES = {module_name(path): imports(path) for path in sorted(ROOT.rglob("*.py"))}


def wing(module):
    """The wing that a module (or a name in one) belongs to; None for the packages that only hold wings."""
    parts = module.split(".")
    return next((name for end in range(len(parts), 1, -1) if (name := ".".join(parts[:end])) in FLOOR), None)


def test_every_module_has_a_floor():
    holders = {"kd_jax", "kd_jax.lm", "kd_jax.gmm"}
    assert [module for module in MODULES if wing(module) is None and module not in holders] == []


def test_imports_point_down():
    offences = [
        f"{module} imports {other}"
        for module, others in MODULES.items()
        for other in sorted(others)
        if wing(module) != wing(other) and wing(other) and wing(module)
        and FLOOR[wing(other)] >= FLOOR[wing(module)]
    ]  # fmt: skip
    assert offences == []


def test_families_do_not_know_each_other():
    offences = [
        f"{module} imports {other}"
        for module, others in MODULES.items()
        for other in others
        for one, two in (("kd_jax.gmm.", "kd_jax.lm."), ("kd_jax.lm.", "kd_jax.gmm."))
        if module.startswith(one) and other.startswith(two)
    ]
    assert offences == []


def test_no_module_imports_its_own_wings_face():
    """A face (__init__) hands names on to other wings; inside the wing it would make a circle."""
    offences = []
    for path in ROOT.rglob("*.py"):
        package = module_name(path).rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == package and path.name != "__init__.py":
                here = {other.stem for other in path.parent.glob("*.py")} | {p.name for p in path.parent.iterdir()}
                offences += [f"{path}: {alias.name}" for alias in node.names if alias.name not in here]
    assert offences == []


def test_no_circle_of_modules():
    edges = {
        module: {name for other in others for name in (other, other.rpartition(".")[0]) if name in MODULES}
        for module, others in MODULES.items()
    }
    # a face is part of its wing: an import from another wing's face is an import of the files behind it
    done, path = set(), []

    def visit(module):
        if module in path:
            raise AssertionError(" -> ".join([*path[path.index(module) :], module]))
        if module not in done:
            path.append(module)
            for other in sorted(edges[module] - {module}):
                if wing(other) != wing(module) or not (other + ".").startswith(module + ".") and other in MODULES:
                    if (module + ".").startswith(other + "."):
                        continue  # its own face
                    visit(other)
            path.pop()
            done.add(module)

    for module in edges:
        visit(module)


def test_folders_and_files_are_of_a_size_that_can_be_seen():
    for folder in [ROOT, *(path for path in ROOT.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 11, f"{folder} has {len(files)} files"
        for path in files:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 350, f"{path} has {lines} lines"


def test_one_name_is_one_thing():
    """Files of one name are the families' own forms of the same thing, or a door and the wing behind it."""
    allowed = {
        "sweep",
        "page",
        "figures",
        "frontier",
        "specs",
        "settings",
        "__init__",
    }  # lm/experiment/settings is to go
    names = {}
    for path in ROOT.rglob("*.py"):
        names.setdefault(path.stem, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in names.items() if len(paths) > 1 and name not in allowed} == {}
