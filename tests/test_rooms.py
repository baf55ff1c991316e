"""The architecture is a test: who may import whom, what is packaged, how long a file may be, what no file may call."""

import ast
import pathlib
import sys
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PROJECT["tool"]["setuptools"]
ROOMS = ("layers", "models", "training", "probes", "configs", "benchmarks", "tpu", "tests")
# `python -m models.generate` is a door too, kept beside what it opens.
DOORS = (*SETUP["py-modules"], "models.generate")
LONGEST = 500

# Which of our modules a file may import, by the longest prefix of its own name. Its own room is always open to it,
# except that `layers.ops` and `layers.kernels` are rooms within a room. A door may import anything.
INSIDE = {
    "layers.kernels": (),
    "layers.ops": ("layers.kernels",),  # inside a function, at dispatch: see `broken_rules`
    "layers": ("layers.ops",),
    "models": ("layers",),
    "training": ("models", "layers"),
    "probes": ("training", "models", "layers"),
    "configs": ("layers", "models", "training.experiment", "training.data", "training.prefix", "probes"),
    "benchmarks": ("probes", "training", "models", "layers"),
    "tpu": ("configs", "probes", "training", "models", "layers", *DOORS),
}
# Which packages of others a leaf may import besides the standard library; rooms not named here choose freely.
OUTSIDE = {
    "layers.kernels": ("jax",),
    # numpy: for constants that are computed once, on the host and in 64 bits (hashes), and stay out of every program.
    "layers.ops": ("jax", "einops", "numpy"),
    "layers": ("jax", "flax", "numpy"),
}
STANDARD = frozenset(sys.stdlib_module_names)

# Reading a file must never run it. numpy's loader is safe only while pickles stay refused.
FORBIDDEN_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
FORBIDDEN_CALLS = ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "os.system")
# A peer's function, cut out of its installed source because importing its module would pull in the whole peer.
EXCEPTIONS = {("benchmarks/contestants_jax.py", "exec")}

FILES = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")))
    if "__pycache__" not in path.parts
)


def module(path: pathlib.PurePath) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Every imported module or member as a dotted name, its line, and whether importing the file imports it."""
    top = {id(node) for statement in tree.body for node in walk_at_import(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield "." * node.level + f"{node.module or ''}.{alias.name}", node.lineno, id(node) in top


def walk_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the file is imported: functions' bodies do not."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from walk_at_import(child)


def broken_rules(name: str, source: str) -> list[str]:
    """What the file of module `name` imports against the table."""
    if name in DOORS or within(name, "tests"):
        return []
    room = max((r for r in INSIDE if within(name, r)), key=len)
    ours = {module(path).split(".")[0] for path in FILES} | set(ROOMS) | set(DOORS)
    broken = []
    for imported, line, at_import in imports(ast.parse(source)):
        first = imported.split(".")[0]
        if imported.startswith("."):
            reason = "is relative: say the whole name"
        elif first in ours:
            inner = max((r for r in INSIDE if within(imported, r)), key=len, default=None)
            if any(within(imported, door) for door in DOORS) and room != "tpu":
                reason = "is a door: nobody comes in by it"
            elif inner == room:
                continue
            elif not any(within(imported, allowed) for allowed in INSIDE[room]):
                reason = f"is not for {room}"
            elif inner == "layers.kernels" and at_import:
                reason = "belongs inside the function that dispatches"
            else:
                continue
        elif first in STANDARD or room not in OUTSIDE or first in OUTSIDE[room]:
            continue
        else:
            reason = f"is not for {room}, which knows only {', '.join(OUTSIDE[room])}"
        broken.append(f"{name}, line {line}: {imported} {reason}")
    return broken


def dangers(file: str, source: str) -> list[str]:
    """Where a file could run what it reads."""
    tree = ast.parse(source)
    found = [
        (imported.split(".")[0], line)
        for imported, line, _ in imports(tree)
        if imported.split(".")[0] in FORBIDDEN_IMPORTS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            unsafe = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
            if called in FORBIDDEN_CALLS or unsafe:
                found.append((called, node.lineno))
    return [f"{file}, line {line}: {name}" for name, line in found if (file, name) not in EXCEPTIONS]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_table(path: pathlib.Path) -> None:
    assert not broken_rules(module(path), (ROOT / path).read_text())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("layers.gla", "import models.lm"),
        ("layers.gla", "from training import step"),
        ("layers.gla", "import optax"),
        ("layers.gla", "from layers.kernels import scan"),
        ("layers.gla", "from .conv import ShortConv"),
        ("layers.ops.linear", "import flax"),
        ("layers.ops.linear", "import scipy"),
        ("layers.ops.linear", "from layers.layer import Tokens"),
        ("layers.ops.linear", "from layers.kernels import scan"),
        ("layers.kernels.scan", "import einops"),
        ("layers.kernels.scan", "from layers.ops import linear"),
        ("models.lm", "def f():\n    import training.step"),
        ("models.lm", "from configs import quickstart"),
        ("models.lm", "from models import generate"),
        ("training.step", "import probes"),
        ("training.run", "import configs.quickstart"),
        ("training.run", "import train"),
        ("probes.evaluation", "from configs import quickstart"),
        ("probes.evaluation", "import benchmarks"),
        ("configs.quickstart", "from training.step import train_step"),
        ("configs.quickstart", "from training import run"),
    ],
)
def test_a_forbidden_import_is_seen(name: str, source: str) -> None:
    assert broken_rules(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("layers.ops.linear", "def f():\n    from layers.kernels import scan"),
        ("layers.ops.linear", "import jax\nimport functools\nfrom layers.ops.pairs import pairs"),
        ("layers.gla", "from layers.ops.linear import linear_recurrence\nfrom layers.layer import Layer"),
        ("configs.quickstart", "from training.experiment import Experiment\nfrom training import experiment"),
        ("train", "import configs, training, probes"),
    ],
)
def test_an_allowed_import_is_allowed(name: str, source: str) -> None:
    assert not broken_rules(name, source)


def test_packages_are_the_folders() -> None:
    folders = {module(path) for path in FILES if path.name == "__init__.py"} - {"tests"}
    assert set(SETUP["packages"]) == folders
    holding_code = {".".join(path.parent.parts) for path in FILES if path.parts[0] != "tests"} - {""}
    assert holding_code == folders, "a folder of code without __init__.py is not installed"
    assert {path.stem for path in FILES if len(path.parts) == 1} == set(SETUP["py-modules"])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_knows_everything(path: pathlib.Path) -> None:
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= LONGEST, f"{path} has {lines} lines: split it by duty"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_runs_what_it_reads(path: pathlib.Path) -> None:
    assert not dangers(str(path.as_posix()), (ROOT / path).read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "def f():\n    import joblib",
        "eval('1')",
        "exec(text)",
        "import yaml\nyaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
    ],
)
def test_a_danger_is_seen(source: str) -> None:
    assert dangers("layers/gla.py", source)


def test_every_exception_is_still_needed() -> None:
    for file, name in EXCEPTIONS:
        called = [n for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.Call)]
        assert name in {ast.unparse(node.func) for node in called}, f"{file} no longer calls {name}"
