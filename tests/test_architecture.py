"""The house rules, read from the source: imports point down, Hydra and pickle stay out, everything is short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kd"
FLOORS = (
    {"errors"},  # the others of floor 0 raise them
    {
        "__init__",
        "config",
        "extras",
        "files",
        "stop",
        "gguf_header",
        "sweep_share",
        "torchrun",
        "huge_pages",
        "head_products",
        "openmp",
    },
    {"checkpoint_files", "sweep_group"},
    {
        "model",
        "losses",
        "optim",
        "distributed",
        "checkpoint",
        "runs",
        "cache",
        "tiles",
        "preference_losses",
        "policy_losses",
        "rewards",
        "outcome",
    },
    {"labelled", "overwriting"},
    {"linear_distillation", "token_logprobs", "heads", "data", "analysis"},
    {"teacher_files", "adapters", "quantization", "run_tokenizer"},
    {"teacher", "generation", "hf_format", "student"},
    {"trainers", "teacher_cache", "start", "samples"},
    {"embedded_teacher", "tokenizer_choice"},
    {"plan"},
    {"teacher_choice", "prepare_examples"},
    {"prepare", "composition"},
    {"products"},
    {"attempt", "sweep_points", "sweep_jobs"},
    {"job", "sweep"},
    {"sweeper"},
    {"train", "evaluate", "generate", "export", "compare", "verify", "selftest"},
    {"sweep_child"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
TUTORIAL = "tutorial"
KNOWS_HYDRA = {"train", "evaluate", "composition", "sweep_points", "sweep", "sweeper"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
THE_LOOP = {"base.py", "evaluating.py", "state.py"}
"""Of kd/trainers: what all trainers share."""
MAX_TRAINER_FILE_LINES, MAX_TRAINER_CLASS_LINES = 149, 99
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.serialization.load", "pandas.read_pickle", "pd.read_pickle"}
UNSAFE_SWITCHES = {"allow_pickle": "False", "trust_remote_code": "False", "use_safetensors": "True"}
"""Keyword to the only value that may be passed."""

FILES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """Return a file's path inside the package, for test ids."""
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    """Return the module or package directly under kd/ that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the absolute names of all imported modules and members, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> list[str]:
    """Return what a file of the package imports."""
    package = ("kd", *path.relative_to(PACKAGE).parts[:-1])
    return list(imported_modules(ast.parse(path.read_text(encoding="utf-8")), package))


def imported_parts(path: Path) -> set[str]:
    """Return the modules and packages directly under kd/ that a file imports."""
    names = [name.split(".") for name in imports_of(path) if name.split(".")[0] == "kd"]
    # `from kd import x` may name a module or a value of kd/__init__.py.
    return {parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else "__init__" for parts in names}


def misplaced(part: str, targets: set[str]) -> set[str]:
    """Return the targets that do not lie on a lower floor than a part (its own package is no step down)."""
    return {target for target in targets if target != part and FLOOR_OF[target] >= FLOOR_OF[part]}


# --- the rules themselves work ------------------------------------------------------------------------------------


def test_imports_are_read_wherever_they_stand() -> None:
    source = (
        "import torch.nn\nfrom kd.data import blocks\ndef f():\n    from .. import files\n    from . import x as y\n"
    )
    found = set(imported_modules(ast.parse(source), ("kd", "data")))
    assert found == {"torch.nn", "kd.data.blocks", "kd.files", "kd.data.x"}


def test_an_upward_import_is_noticed() -> None:
    assert misplaced("losses", {"config", "trainers"}) == {"trainers"}
    assert misplaced("losses", {"optim"}) == {"optim"}
    assert misplaced("data", {"data", "cache"}) == set()


# --- imports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part == TUTORIAL:
        pytest.skip("a leaf, which has a rule of its own")
    assert part in FLOOR_OF, f"give kd/{part} a floor in the design and here"
    assert not misplaced(part, imported_parts(path))


def test_nothing_imports_the_tutorial_and_it_imports_torch_alone() -> None:
    for path in FILES:
        roots = {name.split(".")[0] for name in imports_of(path)}
        inside = part_of(path) == TUTORIAL
        if inside:
            own = all(name.startswith(f"kd.{TUTORIAL}") for name in imports_of(path) if name.startswith("kd"))
            assert own, name_of(path)
            assert roots <= {"torch", "kd", *sys.stdlib_module_names}, name_of(path)
        else:
            assert not any(name.startswith(f"kd.{TUTORIAL}") for name in imports_of(path)), name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_doors_know_hydra(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    if part_of(path) not in KNOWS_HYDRA:
        assert not roots & {"hydra", "omegaconf"}


@pytest.mark.parametrize("modules", ["kd.config, kd.errors, kd.files, kd.runs, kd.composition", "kd.train"])
def test_checks_and_refusals_do_not_wait_for_torch(modules: str) -> None:
    program = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'datasets'}} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


# --- nothing is unpickled -----------------------------------------------------------------------------------------


def unsafe_uses(tree: ast.AST) -> Iterator[str]:
    """Yield what could load a pickle or run a repository's code."""
    for name in imported_modules(tree, ("kd",)):
        if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS:
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
            yield ast.unparse(node)
        if isinstance(node, ast.keyword) and node.arg in UNSAFE_SWITCHES:
            value = ast.unparse(node.value)
            if value != UNSAFE_SWITCHES[node.arg]:
                yield f"{node.arg}={value}"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "from torch import load",
        "x = torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "from_pretrained(x, trust_remote_code=True)",
        "from_pretrained(x, use_safetensors=None)",
    ],
)
def test_an_unsafe_line_is_noticed(line: str) -> None:
    assert list(unsafe_uses(ast.parse(line)))


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) != TUTORIAL], ids=name_of)
def test_nothing_loads_a_pickle(path: Path) -> None:
    assert not list(unsafe_uses(ast.parse(path.read_text(encoding="utf-8"))))


# --- a stop is never taken for a fault ----------------------------------------------------------------------------


BROAD = {"Exception", "KDError", "BaseException"}
"""Whoever catches one of these catches a stop too."""
TELLS_OF_STOPS = {
    "train.py": 2,  # the command's end, which exits with the stop's own code
    "compare.py": 1,  # where a signal has its usual effect, as in kd.generate
    "generate.py": 1,
    "sweep.py": 1,  # the launcher, during which a signal is a request in a file
    "data/hub_access.py": 1,  # a thread, in which no signal arrives
}
"""Files with clauses that catch all, a stop included, and how many."""


def swallows(tree: ast.AST) -> Iterator[str]:
    """Yield the clauses that would end a stop: they catch all, and neither raise again nor follow one for stops."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Try):
            continue
        passed_on = False
        for clause in node.handlers:
            caught = "BaseException" if clause.type is None else ast.unparse(clause.type)
            raises = isinstance(clause.body[-1], ast.Raise) and clause.body[-1].exc is None
            if caught in BROAD and not raises and not passed_on:
                yield f"line {clause.lineno}"
            passed_on |= raises and caught in BROAD | {"Interrupted"}


@pytest.mark.parametrize(
    ("clauses", "count"),
    [
        ("except Exception:\n    pass", 1),
        ("except Exception as error:\n    raise ValueError from error", 1),
        ("except:\n    pass", 1),
        ("except KDError:\n    pass", 1),
        ("except Exception:\n    clean()\n    raise", 0),
        ("except Interrupted:\n    raise\nexcept Exception:\n    pass", 0),
        ("except KDError:\n    raise\nexcept Exception:\n    pass", 0),
        ("except Interrupted:\n    pass\nexcept Exception:\n    pass", 1),
        ("except OSError:\n    pass", 0),
    ],
)
def test_a_clause_that_would_end_a_stop_is_noticed(clauses: str, count: int) -> None:
    assert len(list(swallows(ast.parse(f"try:\n    work()\n{clauses}\n")))) == count


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) != TUTORIAL], ids=name_of)
def test_nothing_catches_a_stop_as_a_fault(path: Path) -> None:
    found = list(swallows(ast.parse(path.read_text(encoding="utf-8"))))
    assert len(found) == TELLS_OF_STOPS.get(name_of(path), 0), found


# --- size and docstrings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, Function)]
    long = {node.name: lines for node in functions if (lines := _lines(node)) > MAX_FUNCTION_LINES}
    assert not long


def _lines(node: Function) -> int:
    """Return a function's length without its docstring, which may be as long as it needs."""
    assert node.end_lineno is not None
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    left_out = 0 if ast.get_docstring(node) is None else docstring.end_lineno - docstring.lineno + 1
    return node.end_lineno - node.lineno + 1 - left_out


def classes_of(path: Path) -> dict[str, int]:
    """Return the lines of each class of a file, docstring included."""
    nodes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in nodes}


def test_trainers_are_short() -> None:
    """What is general is in the loop, and what a trainer needs besides its loss in files of its own."""
    paths = [path for path in FILES if path.parent.name == "trainers" and path.name not in THE_LOOP]
    sizes = {path: classes_of(path) for path in paths}
    trainers = [path for path in paths if any(name.endswith("Trainer") for name in sizes[path])]
    assert {path.stem for path in trainers} >= {"pretrain", "sft", "dpo", "orpo", "grpo", "distillation"}
    for path in trainers:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_TRAINER_FILE_LINES, path.name
        assert max(sizes[path].values()) <= MAX_TRAINER_CLASS_LINES, path.name


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Yield what is public and has no docstring: the module, its functions and classes, and their methods."""
    if ast.get_docstring(tree) is None:
        yield "the module"
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield node.name
            if isinstance(node, ast.ClassDef):
                members = [member for member in node.body if isinstance(member, Function)]
                yield from (
                    f"{node.name}.{member.name}"
                    for member in members
                    if not member.name.startswith("_") and ast.get_docstring(member) is None
                )


def test_a_missing_docstring_is_noticed() -> None:
    source = "class A:\n    '''A.'''\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\n"
    assert list(undocumented(ast.parse(source))) == ["the module", "A.f", "h"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_public_has_a_docstring(path: Path) -> None:
    assert not list(undocumented(ast.parse(path.read_text(encoding="utf-8"))))
