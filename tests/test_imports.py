"""Imports point down only, and `import openreml_nn` stays quick: nothing but the shell imports lightning."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openreml_nn

ROOT = Path(next(iter(openreml_nn.__path__)))

# Lowest first. A module may import from its own layer and from those below it.
LAYERS = (
    ("covariance.transform",),
    ("covariance.levels", "covariance.holder"),
    ("covariance.parameters",),
    ("covariance.matrix",),
    ("covariance.structures",),
    ("covariance.operators",),
    ("covariance",),
    ("testing",),
    ("solvers",),
    ("likelihood",),
    ("objectives",),
    ("optim",),
    ("metrics",),
    ("data",),
    ("summary", "natural_scale", "new_rows", "term_tables"),
    ("result",),
    ("report", "figures", "fit"),
    ("nn",),
    ("lightning",),
    ("cli",),
    ("__main__",),
)
SHELL = {"lightning", "cli", "__main__"}


def layer_of(module: str) -> tuple[int, str] | None:
    """Height and name of the layer of a module (its name without the package); None for the package itself."""
    best: tuple[int, str] | None = None
    for height, names in enumerate(LAYERS):
        for name in names:
            if (module == name or module.startswith(name + ".")) and (best is None or len(name) > len(best[1])):
                best = (height, name)
    return best


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each import, also inside functions; a relative one is made absolute."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = ["openreml_nn", *file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, origin
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def upward(module: str, name: str) -> bool:
    """Whether ``module`` imports ``name`` from a layer above its own."""
    own, other = layer_of(module), layer_of(name.removeprefix("openreml_nn."))
    if own is None or other is None or not name.startswith("openreml_nn."):
        return False
    if own[1] == "testing":
        return not (other[1] == "testing" or other[1].startswith("covariance"))
    return other[0] > own[0]


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def test_every_module_has_a_layer() -> None:
    homeless = [module_name(f) for f in sources() if module_name(f) and layer_of(module_name(f)) is None]
    assert not homeless, f"give these a place in LAYERS: {homeless}"


def test_imports_point_down() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in sources()
        for line, name in imported(file)
        if upward(module_name(file), name)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_shell_imports_lightning() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in sources()
        for line, name in imported(file)
        if name.split(".")[0] in {"lightning", "pytorch_lightning", "jsonargparse"}
        and module_name(file).split(".")[0] not in SHELL
    ]
    assert not wrong, "\n".join(wrong)


def test_messages_between_processes_have_one_place() -> None:
    """``torch.distributed`` is imported, and named, in `solvers.ranks` only."""
    wrong = []
    for file in sources():
        if module_name(file) == "solvers.ranks":
            continue
        named = {(line, name) for line, name in imported(file) if name.startswith("torch.distributed")}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
                named.add((node.lineno, "torch.distributed"))
        wrong += [f"{file.relative_to(ROOT)}:{line} takes {name}" for line, name in sorted(named)]
    assert not wrong, "\n".join(wrong)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_members(tree: ast.AST) -> set[str]:
    """Private methods and attributes of the classes of a module."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {node.name for body in bodies for node in body if isinstance(node, ast.FunctionDef)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    return {name for name in methods | own if private(name)}


def test_private_names_stay_in_their_file() -> None:
    """No import of one, and none taken from an object whose class is in another file."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sources()}
    names = {file: private_members(tree) for file, tree in trees.items()}
    ours = set().union(*names.values())
    wrong = []
    for file, tree in trees.items():
        wrong += [(file, line, name) for line, name in imported(file) if name.startswith("openreml_nn.")
                  and private(name.rpartition(".")[2])]  # fmt: skip
        taken = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ours - names[file]]
        wrong += [(file, node.lineno, node.attr) for node in taken]
    assert not wrong, "\n".join(f"{file.relative_to(ROOT)}:{line} takes {name}" for file, line, name in wrong)


def test_shipped_checks_do_not_need_pytest() -> None:
    names = [(file, name) for file in sources() for _, name in imported(file)]
    assert not [file for file, name in names if name.split(".")[0] in {"pytest", "_pytest"}]


def test_sources_parse_on_the_oldest_supported_python() -> None:
    for file in sources():
        ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_the_walk_sees_an_import_that_points_up() -> None:
    assert upward("covariance.matrix", "openreml_nn.solvers.dense")
    assert upward("covariance.matrix", "openreml_nn.covariance.operators")
    assert upward("testing.check", "openreml_nn.likelihood")
    assert not upward("solvers.dense", "openreml_nn.covariance.matrix")


def test_import_leaves_lightning_out_and_a_fit_torchs_compiler() -> None:
    """Each of them takes a second or more to import."""
    code = (
        "import sys, torch, openreml_nn, openreml_nn.testing\n"
        "from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum\n"
        "Z = DummyMatrix([0, 0, 1, 1, 2, 2])\n"
        "V = Sum(a=CovariancePropagation(Z, ScalarMatrix(3)), residual=ScalarMatrix(6))\n"
        "openreml_nn.fit(V, torch.tensor([1.0, 1.5, 3.0, 2.0, 6.0, 5.0], dtype=torch.float64), solver='dense')\n"
        "names = ('lightning', 'pytorch_lightning', 'pytest', 'torch._dynamo', 'sympy')\n"
        "print([m for m in names if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
