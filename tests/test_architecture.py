"""The packages stand in the order in which data flows: a file imports only what stands below it."""

import ast
import dataclasses
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import finetune
from finetune.store.state import CheckpointState, Progress

ROOT = Path(finetune.__file__).parent
# From the ground up. Those of one line do not import each other.
ORDER = [
    ["errors"],
    ["base"],
    ["recipe"],
    ["data"],
    ["models", "features", "tasks"],
    ["store"],
    ["report"],
    ["watch", "listing", "doctor"],
    ["training"],
    ["export", "runs", "rehearse"],
    ["options"],
    ["commands", "parsing"],
    ["cli"],
    ["api"],
]
# What a notebook calls is a method of the package itself.
ROOT_CALLS = {"api", "export"}


def modules() -> dict[str, Path]:
    paths = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "recipes"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the kit that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "finetune":
            base = node.module.partition(".")[2]
            found |= {name if (name := f"{base}.{alias.name}".strip(".")) in known else base for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("finetune.")}
    return found - {""}


def test_no_file_imports_a_package_above_its_own():
    known = modules()
    floor = {package: number for number, packages in enumerate(ORDER) for package in packages}
    upward = []
    for name, path in known.items():
        package = name.partition(".")[0]
        for target in imports_of(path, known):
            other = target.partition(".")[0]
            allowed = package == other or floor[other] < floor.get(package, len(ORDER))
            if name == "__init__":
                allowed = floor[other] <= floor["recipe"] or other in ROOT_CALLS
            if not allowed:
                upward.append(f"{name} imports {target}")
    assert not upward


def test_no_file_imports_itself_over_others():
    known = modules()
    graph = {name: imports_of(path, known) - {"recipe"} for name, path in known.items() if name != "__init__"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        raise AssertionError(" -> ".join(circle.args[1])) from None


def test_every_package_is_in_the_order():
    packages = {name.partition(".")[0] for name in modules()} - {"__init__"}
    assert packages == {package for packages in ORDER for package in packages}


def test_package_files_are_empty_but_for_the_recipe_s():
    filled = {name.parent.name for name in ROOT.rglob("__init__.py") if name.read_text(encoding="utf-8").strip()}
    assert filled == {"finetune", "recipe"}


def test_the_checkpoint_s_table_in_the_documentation_is_that_of_the_code():
    rows = [("schema_version", "state", "state (migration)")]
    for one in dataclasses.fields(CheckpointState):
        inner = dataclasses.fields(Progress) if one.name == "progress" else [one]
        rows += [(field.metadata["key"], field.metadata["writer"], field.metadata["reader"]) for field in inner]
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    found = [(key.strip("`"), writer, reader) for key, _kind, writer, reader in (row for row in table if len(row) == 4)]
    assert found == rows


def test_train_takes_at_most_five_things_and_makes_no_function():
    tree = ast.parse((ROOT / "training" / "loop.py").read_text(encoding="utf-8"))
    (train,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert train.name == "train" and len(train.args.args) + len(train.args.kwonlyargs) <= 5
    assert not [
        node for node in ast.walk(train) if isinstance(node, ast.FunctionDef | ast.Lambda) and node is not train
    ]
