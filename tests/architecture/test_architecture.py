"""Rules of the code that no linter knows: read from the syntax trees of the packages."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "tenants", "engines")

SQL = re.compile(r"^\s*(SELECT|INSERT INTO|UPDATE \w+|DELETE FROM|WITH \w+ AS|CREATE TABLE|LISTEN|NOTIFY|TRUNCATE)\b")
SQL_ALLOWED = {
    "app/migrate.py": "makes the schema",
    "app/notifications.py": "an empty SELECT shows that the server lives",
}
TENANT_TABLE = re.compile(
    r"\b(?:FROM|INTO|UPDATE|JOIN)\s+(workspace|api_key|variant|usage_open|usage_event)\b", re.IGNORECASE
)
CROSS_TENANT = {
    "remove_instance": "looks whether anything is open that an instance answers for, whoever's it is",
    "remove_dead_instances": "the same",
}
ENVIRONMENT_ALLOWED = ("app/__main__.py", "app/settings.py", "app/cli/", "engines/host/", "engines/convert.py")
FORBIDDEN_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|managers?|base|handlers?|processors?|services?|misc)(_|$)")
LONGEST = 350
LONGER: dict[str, str] = {
    "tenants/ledger.py": "one task and its state",
}
"""Files that may be longer, and why."""
CLOCKS = {"now", "utcnow", "today", "time", "monotonic", "perf_counter", "time_ns", "monotonic_ns", "urandom", "uuid4"}


@cache
def sources() -> dict[str, ast.Module]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files}


def is_queries(path: str) -> bool:
    return bool(re.fullmatch(r"(tenants|engines)/queries(/\w+)?\.py", path))


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of strings that stand alone: docstrings, and those under an attribute."""
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def strings(tree: ast.AST) -> Iterator[ast.Constant]:
    alone = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node


def test_sql_is_only_where_queries_live() -> None:
    found = [
        f"{path}:{node.lineno}: {str(node.value).strip()[:40]!r}"
        for path, tree in sources().items()
        if not is_queries(path) and path not in SQL_ALLOWED
        for node in strings(tree)
        if SQL.match(str(node.value))
    ]
    assert found == []


def text_of(function: ast.AST, constants: dict[str, str]) -> str:
    """All strings of a function, with those of the module's constants that it names."""
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return "\n".join(
        [*(str(node.value) for node in strings(function)), *(constants[n] for n in names & set(constants))]
    )


def constants_of(tree: ast.Module) -> dict[str, str]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                found[target.id] = "\n".join(str(constant.value) for constant in strings(node.value))
    return found


def names_its_workspace(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Public: `workspace` comes right after the connection. Private: it is somewhere. Or the name says `all_…`."""
    name = function.name
    arguments = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    if name.lstrip("_").startswith("all_") or name in CROSS_TENANT:
        return True
    return arguments[1:2] == ["workspace"] or (name.startswith("_") and "workspace" in arguments)


def test_i7_a_query_of_a_tenant_table_takes_its_workspace_first_or_says_all() -> None:
    found = [
        f"{path}:{node.lineno}: {node.name} touches {', '.join(sorted(tables))}"
        for path, tree in sources().items()
        if is_queries(path)
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (tables := set(TENANT_TABLE.findall(text_of(node, constants_of(tree))))) and not names_its_workspace(node)
    ]
    assert found == []


def test_the_environment_is_read_only_at_the_edge() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, tree in sources().items()
        if not path.startswith(ENVIRONMENT_ALLOWED)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}
        if isinstance(node.value, ast.Name) and node.value.id == "os"
    ]
    assert found == []


def test_files_are_named_for_what_they_are() -> None:
    assert [path for path in sources() if FORBIDDEN_NAMES.search(Path(path).stem)] == []
    assert [path for path in sources() if any(FORBIDDEN_NAMES.search(part) for part in Path(path).parent.parts)] == []


def test_classes_are_named_for_what_they_are() -> None:
    bad = re.compile(r"(Manager|Handler|Helper|Processor|Util|Utils|Service|Base|Common)$")
    found = [
        f"{path}:{node.lineno}: {node.name}"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and bad.search(node.name)
    ]
    assert found == []


def test_files_stay_short() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert {path: n for path, n in lengths.items() if n > LONGEST and path not in LONGER} == {}


def pure_modules() -> list[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (pure,) = [contract for contract in contracts if contract["name"] == "pure modules do no I/O"]
    return list(pure["source_modules"])


@pytest.mark.parametrize("module", pure_modules())
def test_pure_modules_ask_no_clock_and_open_nothing(module: str) -> None:
    path = module.replace(".", "/")
    tree = sources().get(f"{path}.py") or sources()[f"{path}/__init__.py"]
    found = [
        f"{path}.py:{call.lineno}: {ast.unparse(call.func)}"
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        if (isinstance(call.func, ast.Attribute) and call.func.attr in CLOCKS)
        or (isinstance(call.func, ast.Name) and call.func.id in {"open", "print", "input"})
    ]
    assert found == []


@pytest.mark.parametrize(
    "lock", ["requirements.lock", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("engines/*.lock"))]
)
def test_locks_name_no_host_and_hash_everything(lock: str) -> None:
    lines = (ROOT / lock).read_text().splitlines()
    assert [line for line in lines if "://" in line or line.startswith(("-", "/"))] == []
    packages = [number for number, line in enumerate(lines) if line and line[0].isalnum()]
    assert packages
    assert [lines[number] for number in packages if "--hash=sha256:" not in lines[number + 1]] == []


def test_pinned_dependencies_are_the_locked_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    locked = {line.split(" ")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    pins = {re.sub(r"\[.*?\]", "", pin).lower() for pin in wanted if "==" in pin}
    assert pins - locked == set()
