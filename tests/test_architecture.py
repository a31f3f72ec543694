"""The arrows between the parts, held by reading every import and a few dangerous calls."""

from __future__ import annotations

import ast
import graphlib
import itertools
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PACKAGE = "widefield"

# From the bottom up. A part imports its own layer and those below it, never one above.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"plan", "calibration"}),
    frozenset({"ops"}),
    frozenset({"methods", "families"}),
    frozenset(
        {
            "extension",
            "original",
            "loading",
            "collect",
            "bundled",
            "states",
            "prefilling",
            "decoding",
            "recording",
        }
    ),
    frozenset({"tasks", "evaluation", "analysis", "training", "integrations"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
STRANGERS = ({"methods", "families"},)

# The names that users type are for users: only the command line may import them from the top.
FACADE_READERS = {"cli", "__main__"}

KERNEL_LIBRARIES = {"triton", "numba", "llvmlite", "cuda"}
PLOT_LIBRARIES = {"matplotlib", "seaborn", "plotly"}
LAZY_LIBRARIES = {"ray", "lm_eval", "accelerate", "datasets", "rouge_score", "jieba"}
UNSAFE_LIBRARIES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
SLOW_LIBRARIES = ("torch", "transformers", "numba", "triton", "matplotlib", "numpy")


@dataclass(frozen=True)
class Import:
    """One imported module, as a dotted name, and where it stands."""

    target: str
    line: int
    lazy: bool
    typing_only: bool

    @property
    def library(self) -> str:
        return self.target.split(".")[0]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The folder or file right below the package; "" is the package itself."""
    return module.removeprefix(PACKAGE).lstrip(".").split(".")[0]


def is_typing_guard(node: ast.If) -> bool:
    return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def targets(node: ast.AST, module: str, is_package: bool, modules: set[str]) -> Iterator[str]:
    """The modules that one statement imports; `from a import b` is a.b where that is a module.

    `from widefield import __version__` is nobody's import: the number belongs to all.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            here = module.split(".")
            kept = len(here) - node.level + is_package
            base = ".".join([*here[:kept], *([base] if base else [])])
        for alias in node.names:
            dotted = f"{base}.{alias.name}"
            if dotted != f"{PACKAGE}.__version__":
                yield dotted if dotted in modules else base
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def imports_in(source: str, module: str, is_package: bool, modules: set[str]) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> None:
        line = getattr(node, "lineno", 0)
        for target in targets(node, module, is_package, modules):
            found.append(Import(target, line, lazy, typing_only))
        if isinstance(node, ast.If) and is_typing_guard(node):
            for child in node.body:
                visit(child, lazy, True)
            for child in node.orelse:
                visit(child, lazy, typing_only)
            return
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside, typing_only)

    visit(ast.parse(source), False, False)
    return found


def sources() -> list[Path]:
    return sorted((SOURCE / PACKAGE).rglob("*.py"))


def all_imports() -> Iterator[tuple[Path, str, Import]]:
    modules = {module_name(path) for path in sources()}
    for path in sources():
        module = module_name(path)
        is_package = path.name == "__init__.py"
        for found in imports_in(path.read_text("utf-8"), module, is_package, modules):
            yield path, module, found


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def direction_fault(module: str, found: Import) -> str | None:
    """Why `module` may not import `found`, or None if it may."""
    if found.library != PACKAGE or module == PACKAGE:
        return None
    here, there = part_of(module), part_of(found.target)
    if there == "":
        if here in FACADE_READERS or found.typing_only:
            return None
        return f"{here} imports the public names of {PACKAGE}; import from the module they live in"
    if {here, there} in STRANGERS:
        return f"{here} imports {there}: the two meet only in plan.py and in extension.py"
    if RANK[there] > RANK[here] and not found.typing_only:
        return f"{here} imports {there}, which lies above it"
    return None


def library_fault(path: Path, found: Import) -> str | None:
    """Why this file may not import that library in this way, or None if it may."""
    name = found.library
    if found.typing_only:
        return None
    if name in KERNEL_LIBRARIES and "ops" not in path.parts:
        return f"{name} is imported outside ops"
    if name in PLOT_LIBRARIES and not path.stem.endswith("plots"):
        return f"{name} is imported outside a plots.py"
    if name in LAZY_LIBRARIES and not found.lazy:
        return f"{name} is optional or slow: import it inside the function that needs it"
    if name in UNSAFE_LIBRARIES:
        return f"{name} can run code from a file: use safetensors or json"
    return None


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword, "?" if it is not one, None if it is absent."""
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else "?"
    return None


def call_fault(call: ast.Call) -> str | None:
    """Why this call is dangerous on input from outside, or None if it is not."""
    name = ast.unparse(call.func)
    if name in {"eval", "exec", "compile", "__import__"}:
        return f"{name}() runs text as code"
    if name == "torch.load" and keyword(call, "weights_only") is not True:
        return "torch.load() without weights_only=True can run code from the file"
    if name in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
        return f"{name}() can build any object: use yaml.safe_load()"
    if keyword(call, "trust_remote_code") not in (None, False):
        return "trust_remote_code runs code from the hub"
    if keyword(call, "allow_pickle") not in (None, False):
        return "allow_pickle can run code from the file"
    if keyword(call, "shell") not in (None, False):
        return "shell=True hands text to a shell"
    return None


def call_faults(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (fault := call_fault(node)):
            yield node.lineno, fault


def report(faults: Iterable[str]) -> None:
    faults = list(faults)
    assert not faults, "\n" + "\n".join(faults)


def test_every_part_of_the_package_has_a_place_among_the_layers() -> None:
    parts = {part_of(module_name(path)) for path in sources()} - {""}
    report(f"src/widefield/{part}: add it to LAYERS" for part in sorted(parts - RANK.keys()))


def test_imports_point_downwards() -> None:
    report(
        f"{place(path, found.line)}: {fault}"
        for path, module, found in all_imports()
        if (fault := direction_fault(module, found))
    )


def test_no_circle_between_the_parts() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    where: dict[tuple[str, str], str] = {}
    for path, module, found in all_imports():
        here, there = part_of(module), part_of(found.target)
        if found.library == PACKAGE and not found.typing_only and here and there and here != there:
            graph[here].add(there)
            where.setdefault((here, there), place(path, found.line))
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]
        steps = itertools.pairwise(circle)
        report(f"{where[here, there]}: {here} imports {there}" for here, there in steps)


def test_libraries_are_imported_where_they_belong() -> None:
    report(
        f"{place(path, found.line)}: {fault}"
        for path, _, found in all_imports()
        if (fault := library_fault(path, found))
    )


def test_nothing_runs_code_from_its_input() -> None:
    paths = [*sources(), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    report(
        f"{place(path, line)}: {fault}"
        for path in paths
        for line, fault in call_faults(path.read_text("utf-8"))
    )


def test_no_recipe_trusts_remote_code() -> None:
    paths = [
        path for kind in ("*.yaml", "*.yml", "*.json") for path in ROOT.glob(f"recipes/**/{kind}")
    ]
    report(
        f"{place(path, 1)}: trust_remote_code runs code from the hub"
        for path in paths
        if "trust_remote_code" in path.read_text("utf-8")
    )


@pytest.mark.parametrize("module", ["widefield", "widefield.cli"])
def test_importing_the_top_is_quick(module: str) -> None:
    code = (
        f"import {module}, sys\n"
        f"print(*(name for name in {SLOW_LIBRARIES!r} if name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loaded = run.stdout.split()
    assert not loaded, f"import {module} loads {', '.join(loaded)}: import them inside functions"


# The rules themselves, on small sources: a rule that never fires must not pass for one that holds.

MODULES = {PACKAGE, "widefield.ops", "widefield.methods", "widefield.cli", "widefield.extension"}


def one_import(source: str, module: str = "widefield.ops.pool.reference") -> Import:
    (found,) = imports_in(source, module, False, MODULES)
    return found


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("widefield.ops.scan", "from widefield import methods", "ops imports methods"),
        ("widefield.ops.scan", "import widefield.cli.demo", "ops imports cli"),
        ("widefield.ops.scan", "def f():\n    from widefield.extension import extend", "above"),
        ("widefield.methods.base", "from ..families import mamba", "methods imports families"),
        ("widefield.families.mamba", "from widefield import methods", "families imports methods"),
        ("widefield.tasks.passkey", "import widefield as wf", "public names"),
        ("widefield.ops.scan", "from importlib import import_module", None),
        ("widefield.ops.scan", "import_module('widefield.cli')", "ops imports cli"),
        ("widefield.ops.scan", "from widefield.errors import unknown", None),
        ("widefield.cli.demo", "import widefield as wf", None),
        ("widefield.cli.demo", "from widefield.tasks import passkey", None),
        ("widefield.extension", "if TYPE_CHECKING:\n    from widefield.cli import main", None),
    ],
)
def test_the_rule_of_direction_sees(module: str, source: str, said: str | None) -> None:
    fault = direction_fault(module, one_import(source, module))
    assert fault is None if said is None else said in (fault or "")


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("methods/longmamba.py", "import numba", "outside ops"),
        ("methods/longmamba.py", "def f():\n    import triton.language as tl", "outside ops"),
        ("ops/selective_scan/cpu.py", "import numba", None),
        ("evaluation/runner.py", "from cuda.bindings import driver", "outside ops"),
        ("cli/demo.py", "def f():\n    import matplotlib.pyplot", "outside a plots.py"),
        ("evaluation/plots.py", "import matplotlib", None),
        ("integrations/harness.py", "from lm_eval.api import model", "inside the function"),
        ("integrations/harness.py", "def f():\n    import lm_eval", None),
        ("loading.py", "import pickle", "safetensors"),
    ],
)
def test_the_rule_of_libraries_sees(path: str, source: str, said: str | None) -> None:
    fault = library_fault(SOURCE / PACKAGE / path, one_import(source))
    assert fault is None if said is None else said in (fault or "")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("eval(text)", "runs text"),
        ("model.eval()", None),
        ("re.compile(text)", None),
        ("torch.load(path)", "weights_only"),
        ("torch.load(path, weights_only=False)", "weights_only"),
        ("torch.load(path, weights_only=True)", None),
        ("yaml.load(text, Loader)", "safe_load"),
        ("yaml.safe_load(text)", None),
        ("AutoModel.from_pretrained(x, trust_remote_code=flag)", "hub"),
        ("AutoModel.from_pretrained(x, trust_remote_code=False)", None),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("subprocess.run(text, shell=True)", "shell"),
    ],
)
def test_the_rule_of_calls_sees(source: str, said: str | None) -> None:
    faults = [fault for _, fault in call_faults(source)]
    assert faults == [] if said is None else said in faults[0]
