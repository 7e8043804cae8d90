"""Holds the one way through the house (imports, purity, docstrings) against the code itself, without running it."""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "sami_jax"

# The layers of the page: a module may import the modules before it, and none behind it, wherever in the file the import
# stands. A module that is not there has no layer yet: put it where it belongs.
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ORDER = PAGE.partition("```layers\n")[2].partition("```")[0].split()
# The doors: `import sami_jax` and `python -m sami_jax` may know everything; the packages hold no code.
DOORS = ["", "__main__"]
PACKAGES = "config data model sampling scoring huggingface chat miniature evaluation stages report run cli".split()

# These may know the settings of a whole run; the others are handed a section or a value.
KNOW_A_RUN = ("config.run", "stages.", "run.", "cli.", "plan", "report.")
FILE_LINES, FUNCTION_LINES = 350, 80

# What another training stack gets with losses.py.
LOSS_IMPORTS = {"jax", "chex", "typing"} | set(sys.stdlib_module_names)

# Parts of numpy.random and random that carry their own state instead of sharing one.
EXPLICIT_RANDOMNESS = {"default_rng", "Generator", "SeedSequence", "BitGenerator", "Philox", "PCG64", "PCG64DXSM"}


def module_name(path: pathlib.Path) -> str:
    """The name of a module below sami_jax: `data.pairs` for sami_jax/data/pairs.py, `data` for its __init__.py."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
CONFIGS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").rglob("*.py"))}


def imported_names(source: str, importer: str = "", *, is_package: bool = False) -> Iterator[str]:
    """Every dotted name a source imports, at any depth; `from a import b` gives `a.b`, for b may be a module.

    Args:
      source: Python.
      importer: full name of the module it is the source of, to resolve `from . import x`.
      is_package: whether that module is an __init__.py, whose `.` is itself.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                parts = importer.split(".")
                base = parts[: len(parts) - node.level + is_package] + base
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def imported_modules(name: str, source: str, known: set[str]) -> set[str]:
    """The modules below sami_jax that one of them imports, "" for the package itself."""
    found = set()
    full_name = f"{PACKAGE}.{name}" if name else PACKAGE
    for dotted in imported_names(source, full_name, is_package=name in ["", *PACKAGES]):
        if dotted.split(".")[0] != PACKAGE:
            continue
        parts = dotted.split(".")[1:]
        # The longest prefix that is a module: what follows it is a name inside.
        found.add(next(prefix for n in range(len(parts), -1, -1) if (prefix := ".".join(parts[:n])) in known | {""}))
    return found


def backward_imports(sources: dict[str, str]) -> list[str]:
    """Imports that run against ORDER, one line each; a module without a layer is left to `misplaced_modules`."""
    known = {*ORDER, *DOORS, *PACKAGES, *sources}
    wrong = []
    for name, source in sources.items():
        if name in DOORS or misplaced_modules([name]):
            continue
        allowed = set() if name in PACKAGES else set(ORDER[: ORDER.index(name)])
        wrong += [
            f"{name} imports {other or PACKAGE}, which is not before it"
            for other in sorted(imported_modules(name, source, known) - allowed)
        ]
    return wrong


def misplaced_modules(names: list[str]) -> list[str]:
    """Modules that ORDER does not mention."""
    return [name for name in names if name not in [*ORDER, *DOORS, *PACKAGES]]


def too_long(source: str) -> list[str]:
    """The functions, and the file itself, that nobody takes in at a glance."""
    lines = source.count("\n")
    wrong = [f"{lines} lines"] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            wrong += [f"{node.name}: {length} lines"] if length > FUNCTION_LINES else []
    return wrong


def knows_a_run(source: str) -> bool:
    """Whether a module names the settings of a whole run."""
    return any(
        isinstance(node, ast.Name)
        and node.id == "RunConfig"
        or isinstance(node, ast.alias)
        and node.name == "RunConfig"
        for node in ast.walk(ast.parse(source))
    )


def missing_sentence(source: str) -> str | None:
    """What is wrong with a module's docstring: its first paragraph is to be one sentence. An empty file needs none."""
    tree = ast.parse(source)
    if not tree.body:
        return None
    summary = (ast.get_docstring(tree) or "").split("\n\n")[0]
    if not summary:
        return "has no docstring"
    if not summary.endswith("."):
        return f"does not end its first paragraph with a full stop: {summary!r}"
    if re.search(r"[.!?]\s+[A-Z]", summary):
        return f"says more than one sentence in its first paragraph: {summary!r}"
    return None


def global_randomness(source: str) -> list[str]:
    """Uses of random state that belongs to the process: `np.random.normal`, `random.choice`, `default_rng()`."""
    tree = ast.parse(source)
    origins: dict[str, str] = {}  # local name -> the dotted name it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                origins[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            origins |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def meaning(node: ast.expr) -> str:
        first, _, rest = ast.unparse(node).partition(".")
        return ".".join(filter(None, [origins.get(first, "a local name " + first), rest]))

    wrong = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            continue
        module, _, function = meaning(node.func).rpartition(".")
        seeded = bool(node.args or node.keywords)
        explicit = (module == "numpy.random" and function in EXPLICIT_RANDOMNESS) or (
            module == "random" and function == "Random"
        )
        if module in ("random", "numpy.random") and not (explicit and seeded):
            wrong.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return wrong


def swallowed_errors(source: str) -> list[str]:
    """Handlers of every exception whose body does nothing."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        everything = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)
        nothing = all(isinstance(line, ast.Pass | ast.Continue) or _is_constant(line) for line in node.body)
        if everything and nothing:
            wrong.append(f"line {node.lineno}")
    return wrong


def _is_constant(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def test_every_module_has_a_layer_and_every_layer_is_there():
    assert misplaced_modules(list(SOURCES)) == []
    assert [name for name in ORDER if name not in SOURCES] == [] and len(set(ORDER)) == len(ORDER)


def test_the_page_names_files_that_are_there():
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", PAGE))
    missing = [name for name in named if not (ROOT / PACKAGE / name).is_file() and not (ROOT / name).is_file()]
    assert len(named) > 30 and missing == []


def test_imports_run_one_way():
    assert backward_imports(SOURCES) == []


def test_losses_stand_alone():
    assert {name.split(".")[0] for name in imported_names(SOURCES["losses"])} <= LOSS_IMPORTS


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_do_not_import_the_package(name: str):
    assert [found for found in imported_names(CONFIGS[name]) if found.split(".")[0] == PACKAGE] == []


@pytest.mark.parametrize("name", SOURCES)
def test_docstring_says_the_purpose_in_one_sentence(name: str):
    assert missing_sentence(SOURCES[name]) is None


@pytest.mark.parametrize("name", SOURCES)
def test_randomness_is_explicit(name: str):
    assert global_randomness(SOURCES[name]) == []


@pytest.mark.parametrize("name", SOURCES)
def test_errors_are_not_swallowed(name: str):
    assert swallowed_errors(SOURCES[name]) == []


@pytest.mark.parametrize("name", SOURCES)
def test_files_and_functions_are_short(name: str):
    assert too_long(SOURCES[name]) == []


def test_settings_are_handed_on_and_not_the_whole_config():
    assert [name for name in SOURCES if knows_a_run(SOURCES[name]) and not name.startswith(KNOW_A_RUN)] == []


class TestTheChecks:
    """Each check finds what is planted for it, and nothing else."""

    @pytest.mark.parametrize(
        ("name", "source", "found"),
        [
            ("losses", "from sami_jax import scoring", "scoring"),
            ("losses", "def f():\n  import sami_jax.training as t", "training"),
            ("data.prompts", "from sami_jax.data.pairs import Pair", "data.pairs"),
            ("data.prompts", "from . import pairs", "data.pairs"),
            ("data.prompts", "from ..model import layers", "model.layers"),
            ("model.shape", "from sami_jax.model.decoder import Decoder", "model.decoder"),
            ("scoring", "import sami_jax", "sami_jax"),
            ("scoring", "import importlib\nimportlib.import_module('sami_jax.cli.main')", "cli.main"),
            ("scoring", "from sami_jax.scoring import f", "scoring"),
            ("data", "from sami_jax.data import pairs", "data.pairs"),
            ("data", "from . import pairs", "data.pairs"),
        ],
    )
    def test_backward_imports(self, name: str, source: str, found: str):
        assert backward_imports({name: source}) == [f"{name} imports {found}, which is not before it"]

    def test_forward_imports_pass(self):
        source = (
            "import jax\nfrom sami_jax.losses import sami_loss\nfrom sami_jax.model import layers\nfrom . import types"
        )
        assert backward_imports({"training": source}) == []
        assert (
            backward_imports({"": "from sami_jax.cli import main", "__main__": "from sami_jax.cli.main import main"})
            == []
        )

    def test_too_long(self):
        assert too_long("def f():\n" + "    x = 1\n" * 79) == [] and too_long("x = 1\n" * 350) == []
        assert too_long("def f():\n    def g():\n" + "        x = 1\n" * 80) == ["f: 82 lines", "g: 81 lines"]
        assert too_long("x = 1\n" * 351) == ["351 lines"]

    @pytest.mark.parametrize("source", ["from sami_jax.config.run import RunConfig", "def f(config: RunConfig): ..."])
    def test_knows_a_run(self, source: str):
        assert knows_a_run(source) and not knows_a_run(source.replace("RunConfig", "TrainConfig"))

    def test_misplaced_modules(self):
        assert misplaced_modules(["losses", "utils", "data.misc"]) == ["utils", "data.misc"]

    @pytest.mark.parametrize("source", ["x = 1", '"""No stop"""', '"""One. Two."""', '"""One.\nTwo."""'])
    def test_missing_sentence(self, source: str):
        assert missing_sentence(source) is not None

    @pytest.mark.parametrize("source", ["", '"""One sentence."""', '"""One, over\ntwo lines.\n\nMore. And more."""'])
    def test_sentence_passes(self, source: str):
        assert missing_sentence(source) is None

    @pytest.mark.parametrize(
        "source",
        [
            "import numpy as np\nnp.random.normal()",
            "import numpy\nnumpy.random.seed(0)",
            "import numpy as np\nrng = np.random.default_rng()",
            "from numpy import random as r\nr.shuffle([])",
            "from numpy.random import rand\nrand()",
            "import random\nrandom.choice([1])",
            "from random import shuffle\ndef f(xs):\n  shuffle(xs)",
        ],
    )
    def test_global_randomness(self, source: str):
        assert len(global_randomness(source)) == 1

    @pytest.mark.parametrize(
        "source",
        [
            "import jax\njax.random.normal(key)",
            "from jax import random\nrandom.normal(key)",
            "import numpy as np\nnp.random.default_rng(0).normal()",
            "import numpy as np\nnp.random.Generator(np.random.Philox(key=1))",
            "import random\nrandom.Random(0).choice([1])",
        ],
    )
    def test_explicit_randomness_passes(self, source: str):
        assert global_randomness(source) == []

    @pytest.mark.parametrize("caught", ["", " Exception", " BaseException as e", " (ValueError, Exception)"])
    @pytest.mark.parametrize("body", ["pass", "...", "continue"])
    def test_swallowed_errors(self, caught: str, body: str):
        assert swallowed_errors(f"for _ in x:\n try: f()\n except{caught}: {body}") == ["line 3"]

    @pytest.mark.parametrize(
        "handler", ["except OSError: pass", "except Exception: raise", "except Exception as e: log(e)"]
    )
    def test_handled_errors_pass(self, handler: str):
        assert swallowed_errors(f"try: f()\n{handler}") == []
