"""The shape of the code: import floors, sizes, docstrings, what may load JAX, what is not written.

Each rule is a function from source texts to complaints. The first half of the tests shows that each
rule catches a planted fault; the second half holds the repository to all of them.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE_FOLDERS = ("dsv3_jax", "tests", "configs", "benchmarks", "experiments", "notebooks", "launch")
TEXT_SUFFIXES = {"", ".cfg", ".ipynb", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml"}

# A file imports from lower floors and from its own folder, never sideways or up.
FLOORS = {
    "cli": 0,  # what the commands share; knows no other module
    "config": 0,
    "files": 0,
    "drawing": 1,  # pictures, of plans as of runs
    "process": 1,  # what a command's process needs before JAX is imported
    "data": 1,
    "quant": 1,
    "parallel": 2,  # stage and expert functions come in as arguments
    "model": 3,
    "checkpoint": 4,
    "inference": 5,
    "plan": 5,  # closed form
    "server": 6,
    "train": 6,
    "evaluate": 7,
    "plan.compile": 7,  # compiles the programs of `train`
    "plan.compile_step": 7,
    "posttrain": 8,
}
COMMAND_FLOOR = 9  # modules at the root and every __main__

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
# Path or path::function -> the reason why it may be longer.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

# Importing any of these loads JAX.
LOADS_JAX = {"chex", "flax", "grain", "jax", "jaxlib", "optax", "orbax"}
PLAIN_SCHEDULING = {f"dsv3_jax.parallel.{name}" for name in ("dualpipe", "eplb", "schedules")}
OUTSIDE = {"benchmarks", "configs", "experiments", "notebooks", "tests"}
NNX_TRANSFORMS = {"grad", "jit", "pmap", "remat", "scan", "value_and_grad", "vmap"}

OPEN_ENDS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
MACHINE_PATHS = re.compile(r"(?<![\w.:/<-])/(?:Users|home|root|work)/\w")
PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_]*")

Sources = Mapping[str, str]  # path relative to the root -> text


# --- reading sources ---


def module_name(path: str) -> str:
    """dsv3_jax/model/mla.py -> dsv3_jax.model.mla; a package's __init__ is the package."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str, sources: Sources) -> list[tuple[str, int, bool]]:
    """Every module that a file imports, its line, and whether that happens when the file loads:
    not inside functions, and not under TYPE_CHECKING."""
    known = {module_name(p) for p in sources}
    return [
        (target, node.lineno, at_load)
        for node, at_load in _nodes(ast.parse(sources[path]))
        for target in sorted(_targets(node, path, known))
    ]


def _nodes(node: ast.AST, at_load: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inner = at_load and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = False
        yield child, inner
        yield from _nodes(child, inner)


def _targets(node: ast.AST, path: str, known: set[str]) -> set[str]:
    """Modules named by an import; `from a import b` means a.b if that is a module, else a."""
    match node:
        case ast.Import(names=names):
            return {alias.name for alias in names}
        case ast.ImportFrom(module=module, names=names, level=level):
            package = path.split("/")[:-level] if level else []
            base = ".".join([*package, *filter(None, [module])])
            full = {f"{base}.{alias.name}" for alias in names} - {"dsv3_jax.__version__"}
            return {name if name in known else base for name in full}
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
            return {name} if ast.unparse(func).endswith(("import_module", "__import__")) else set()
    return set()


def is_command(path: str, text: str) -> bool:
    """Whether users start this file: at the package's root, a __main__, or guarded as one."""
    at_root = path.count("/") == 1 and not path.endswith(("__init__.py", "/config.py"))
    return at_root or path.endswith("__main__.py") or 'if __name__ == "__main__"' in text


# --- rules: sources -> complaints ---


def floor_of(module: str) -> int:
    """Floor of a module; KeyError for a folder that has none. The root, whose names come from
    everywhere, lies above all: the package imports a name from the module that defines it."""
    _, *parts = module.split(".")
    if not parts:
        return COMMAND_FLOOR + 1
    if parts[-1] == "__main__" or not _folder(module):
        return COMMAND_FLOOR
    return FLOORS.get(".".join(parts[:2]), FLOORS[parts[0]])


def _folder(module: str) -> str:
    """First folder below the package; empty for the root and the commands in it."""
    _, *parts = module.split(".")
    return parts[0] if len(parts) > 1 or (parts and parts[0] in FLOORS) else ""


def floor_complaints(sources: Sources) -> list[str]:
    """Imports inside the package that do not lead down or stay in their folder."""
    complaints = []
    for path in (p for p in sources if p.startswith("dsv3_jax/") and p != "dsv3_jax/__init__.py"):
        module = module_name(path)
        for target, line, _ in imports_of(path, sources):
            top = target.partition(".")[0]
            if top in OUTSIDE:
                complaints.append(f"{path}:{line}: the package imports {target}")
            if top != "dsv3_jax":
                continue
            here, there = floor_of(module), floor_of(target)
            if there > here or (there == here and _folder(module) != _folder(target)):
                complaints.append(f"{path}:{line}: floor {here} imports {target} of floor {there}")
    return complaints


def jax_complaints(sources: Sources) -> list[str]:
    """Modules that load JAX though commands, the configuration or schedules must not."""
    files = {module_name(path): path for path in sources if path.startswith("dsv3_jax/")}
    complaints = []
    for module, path in files.items():
        everything = module in PLAIN_SCHEDULING
        if everything or module.startswith("dsv3_jax.config") or is_command(path, sources[path]):
            chain = _chain_to_jax(module, files, sources, everything)
            if chain:
                complaints.append(f"{path} loads JAX: {' -> '.join(chain)}")
    return complaints


def _chain_to_jax(
    start: str, files: Mapping[str, str], sources: Sources, everything: bool
) -> list[str]:
    """Shortest import chain from a module to one that loads JAX; empty if there is none."""
    queue, seen = [[start]], {start}
    for chain in queue:
        for target, _, at_load in imports_of(files[chain[-1]], sources):
            if not (at_load or everything):
                continue
            if target.partition(".")[0] in LOADS_JAX:
                return [*chain, target]
            parts = target.split(".")
            loaded = [".".join(parts[: i + 1]) for i in range(len(parts))]  # parents come along
            for name in (n for n in loaded if n in files and n not in seen):
                seen.add(name)
                queue.append([*chain, name])
    return []


def size_complaints(sources: Sources) -> list[str]:
    """Files and functions beyond the limits without a reason, and reasons no longer needed."""
    files = {p: len(text.splitlines()) for p, text in sources.items()}
    functions = {
        f"{path}::{node.name}": node.end_lineno - node.lineno + 1
        for path, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    complaints = []
    for sizes, limit, allowed in (
        (files, MAX_FILE_LINES, LONG_FILES),
        (functions, MAX_FUNCTION_LINES, LONG_FUNCTIONS),
    ):
        long = {name for name, size in sizes.items() if size > limit}
        complaints += [f"{n}: {sizes[n]} lines, limit {limit}" for n in sorted(long - set(allowed))]
        complaints += [f"{n}: listed as long, but is not" for n in sorted(set(allowed) - long)]
    return complaints


def text_complaints(sources: Sources) -> list[str]:
    """Missing docstrings, odds-and-ends modules, NNX transforms, open ends."""
    complaints = []
    for path, text in sources.items():
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            complaints.append(f"{path}: no module docstring")
        if path.endswith(("/utils.py", "/utils/__init__.py")):
            complaints.append(f"{path}: name the one thing it holds instead")
        if match := OPEN_ENDS.search(text):
            complaints.append(f"{path}: {match[0]} left in the code")
        for node in ast.walk(tree):
            if name := _nnx_transform(node):
                complaints.append(f"{path}:{node.lineno}: nnx.{name}; use its JAX namesake")
    return complaints


def _nnx_transform(node: ast.AST) -> str | None:
    match node:
        case ast.Attribute(attr=name, value=value) if ast.unparse(value) in ("nnx", "flax.nnx"):
            return name if name in NNX_TRANSFORMS else None
        case ast.ImportFrom(module="flax.nnx", names=names):
            return next((alias.name for alias in names if alias.name in NNX_TRANSFORMS), None)
    return None


def path_complaints(texts: Sources) -> list[str]:
    """Places of one machine in any text file."""
    found = ((path, MACHINE_PATHS.search(text)) for path, text in texts.items())
    return [f"{path}: path of one machine, {match[0]}…" for path, match in found if match]


def pin_complaints(text: str, needed: set[str]) -> list[str]:
    """Lines of a constraints file that are no exact pin, and needed packages without one."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pinned = {_normal(line.partition("==")[0]) for line in lines}
    complaints = [f"not an exact version: {line}" for line in lines if not PIN.fullmatch(line)]
    return complaints + [f"{name} is not pinned" for name in sorted(needed - pinned)]


def _normal(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


# --- each rule can fail ---


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("dsv3_jax/model/mla.py", "from dsv3_jax.train import loop"),
        ("dsv3_jax/model/mla.py", "def f():\n    import dsv3_jax.train.loop"),
        ("dsv3_jax/model/mla.py", "from ..train.loop import run"),
        ("dsv3_jax/model/mla.py", "importlib.import_module('dsv3_jax.train.loop')"),
        ("dsv3_jax/model/mla.py", "from dsv3_jax import DeepSeekV3"),
        ("dsv3_jax/model/mla.py", "from tests.tolerances import FLOAT32"),
        ("dsv3_jax/data/loader.py", "from dsv3_jax.quant import fp8"),
        ("dsv3_jax/inference/engine.py", "from dsv3_jax.plan.memory import weights"),
        ("dsv3_jax/plan/memory.py", "from dsv3_jax.plan.compile import lower"),
        ("dsv3_jax/train/loop.py", "from dsv3_jax.train.__main__ import main"),
        ("dsv3_jax/train/loop.py", "from dsv3_jax import sft"),
        ("dsv3_jax/config.py", "from dsv3_jax.data import loader"),
    ],
)
def test_an_import_up_or_sideways_is_caught(path: str, text: str):
    sources = {"dsv3_jax/train/loop.py": "", "dsv3_jax/sft.py": "", path: text}
    assert len(floor_complaints(sources)) == 1


def test_an_import_down_or_within_the_folder_passes():
    sources = {
        "dsv3_jax/__init__.py": "from dsv3_jax.model.mla import MLA",
        "dsv3_jax/config/__init__.py": "from dsv3_jax.config.run import RunConfig",
        "dsv3_jax/model/mla.py": "from dsv3_jax.model.layers import x\nimport dsv3_jax.quant",
        "dsv3_jax/plan/compile.py": "from dsv3_jax.plan import memory\nimport dsv3_jax.train",
        "dsv3_jax/train/__main__.py": "from dsv3_jax import __version__, config\nfrom . import x",
        "dsv3_jax/train/loop.py": "from dsv3_jax.config import RunConfig\nimport jax",
        "dsv3_jax/cli.py": "import sys",
        "dsv3_jax/serve.py": "from dsv3_jax import cli\nfrom dsv3_jax.sft import main",
        "dsv3_jax/sft.py": "from dsv3_jax.posttrain.sft import run",
    }
    assert floor_complaints(sources) == []


def test_a_folder_without_a_floor_is_refused():
    with pytest.raises(KeyError):
        floor_complaints({"dsv3_jax/misc/a.py": "import dsv3_jax.config"})


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("dsv3_jax/config/run.py", "import jax"),
        ("dsv3_jax/train/__main__.py", "from dsv3_jax.train.loop import run"),
        ("dsv3_jax/generate.py", "from dsv3_jax.train import loop"),
        ("dsv3_jax/train/compare.py", 'import optax\nif __name__ == "__main__":\n    main()'),
        ("dsv3_jax/parallel/eplb.py", "def f():\n    from jax import numpy"),
    ],
)
def test_loading_jax_is_caught(path: str, text: str):
    assert len(jax_complaints({"dsv3_jax/train/loop.py": "import jax.numpy", path: text})) == 1


def test_loading_jax_in_the_function_that_needs_it_passes():
    text = "if TYPE_CHECKING:\n    import jax\ndef f():\n    import jax"
    assert jax_complaints({"dsv3_jax/train/__main__.py": text}) == []


def test_long_files_and_functions_are_caught(monkeypatch: pytest.MonkeyPatch):
    body = "    pass\n" * MAX_FUNCTION_LINES
    sources = {"a.py": f"def f():\n{body}", "b.py": "\n" * (MAX_FILE_LINES + 1)}
    monkeypatch.setitem(LONG_FILES, "c.py", "a reason that has outlived its file")
    assert len(size_complaints(sources)) == 3
    assert size_complaints({"a.py": f"def f():\n{body[9:]}", "c.py": sources["b.py"]}) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.py", "x = 1"),
        ("dsv3_jax/utils.py", '"""Odds and ends."""'),
        ("a.py", '"""Doc."""\n# TO' + "DO: later"),
        ("a.py", '"""Doc."""\nf = nnx.jit(g)'),
        ("a.py", '"""Doc."""\nfrom flax.nnx import Param, scan'),
    ],
)
def test_missing_docstrings_and_unwanted_text_are_caught(path: str, text: str):
    assert len(text_complaints({path: text})) == 1


def test_paths_of_a_machine_are_caught():
    assert (
        len(path_complaints({"a.md": "cd /" + "home/ada/dsv3_jax", "b.md": "~/runs, a/home/b"}))
        == 1
    )


@pytest.mark.parametrize(
    "line", ["jax @ file:///x.whl", "jax>=0.10", "-e .", "jax==0.10  --hash=1"]
)
def test_a_constraint_that_is_no_exact_version_is_caught(line: str):
    assert len(pin_complaints(f"# pins\nflax==0.12.8\n{line}\n", {"flax"})) == 1
    assert pin_complaints("flax==0.12.8\n", {"flax", "jax"}) == ["jax is not pinned"]


# --- the repository ---


@pytest.fixture(scope="module")
def sources() -> Sources:
    """All Python files of the repository."""
    paths = [*ROOT.glob("*.py"), *(p for top in CODE_FOLDERS for p in (ROOT / top).rglob("*.py"))]
    found = {p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for p in sorted(paths)}
    assert "dsv3_jax/__init__.py" in found
    return found


def expect_none(complaints: list[str]) -> None:
    """One complaint a line, where pytest would shorten the list."""
    assert not complaints, "\n" + "\n".join(complaints)


def test_imports_lead_down_the_floors(sources: Sources):
    expect_none(floor_complaints(sources))


def test_commands_configuration_and_schedules_load_no_jax(sources: Sources):
    expect_none(jax_complaints(sources))


def test_files_and_functions_are_short(sources: Sources):
    expect_none(size_complaints(sources))


def test_modules_are_described_and_free_of_unwanted_text(sources: Sources):
    expect_none(text_complaints(sources))


def test_no_text_names_a_place_of_one_machine():
    folders = [ROOT / top for top in (*CODE_FOLDERS, "constraints", "docs", ".ci")]
    paths = [*ROOT.iterdir(), *(p for folder in folders for p in folder.rglob("*"))]
    kept = [p for p in paths if p.is_file() and p.suffix in TEXT_SUFFIXES]
    expect_none(path_complaints({str(p): p.read_text("utf-8", "replace") for p in kept}))


@pytest.mark.parametrize("line", ["py311", "py312"])
def test_constraints_are_exact_and_cover_every_dependency(line: str):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group]
    needed = {_normal(r) for r in [*project["dependencies"], *extras]}
    expect_none(pin_complaints((ROOT / f"constraints/{line}.txt").read_text("utf-8"), needed))


def test_no_tracked_file_exceeds_one_megabyte():
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or not git.stdout:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in git.stdout.split("\0") if name]
    expect_none([str(p) for p in tracked if p.is_file() and p.stat().st_size > 1_000_000])
