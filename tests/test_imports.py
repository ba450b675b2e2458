"""Which module may import which, read from the source: an import inside a function counts too."""

import ast
from pathlib import Path

import kd_jax

ROOT = Path(kd_jax.__file__).parent
DOORS = {"kd_jax.train", "kd_jax.evaluate", "kd_jax.sample", "kd_jax.teacher"}


def module_name(path):
    parts = ("kd_jax", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """The kd_jax modules a file names in its imports, `from a import b` as both a and a.b."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {module for module in found if module == "kd_jax" or module.startswith("kd_jax.")}


MODULES = {module_name(path): imports(path) for path in sorted(ROOT.rglob("*.py"))}


def within(module, package):
    return module == package or module.startswith(package + ".")


def offences(inside, *banned):
    return [
        f"{module} imports {other}"
        for module, others in MODULES.items()
        if within(module, inside)
        for other in sorted(others)
        if any(within(other, package) for package in banned)
    ]


def test_walk_sees_the_package():
    assert "kd_jax.config" in MODULES["kd_jax.run"]


def test_experiments_do_not_know_each_other():
    assert offences("kd_jax.gmm", "kd_jax.lm") == []
    assert offences("kd_jax.lm", "kd_jax.gmm") == []


def test_experiments_do_not_know_what_runs_them():
    for package in ("kd_jax.gmm", "kd_jax.lm"):
        assert offences(package, "kd_jax.report", "kd_jax.train") == []


def test_pages_and_figures_of_all_experiments_know_none_of_them():
    for module in ("kd_jax.page", "kd_jax.figures", "kd_jax.frontier_page", "kd_jax.report"):
        assert module in MODULES and offences(module, "kd_jax.gmm", "kd_jax.lm") == []


def test_only_the_run_that_ends_with_a_report_imports_its_door():
    assert {offence.split()[0] for offence in offences("kd_jax", "kd_jax.report")} <= {"kd_jax.train"}


def test_leaves_import_nothing_of_ours():
    for leaf in ("kd_jax.metrics", "kd_jax.frontier"):
        assert leaf in MODULES and MODULES[leaf] == set()


def test_nothing_imports_a_door():
    assert offences("kd_jax", *DOORS) == []
