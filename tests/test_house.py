"""Style as a test: what a reviewer would otherwise have to look for by hand in every change."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "proxy").rglob("*.py"))
SQL = sorted((ROOT / "proxy" / "ledger" / "sql").rglob("*.sql"))
PROSE = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600
SQL_CALLS = re.compile(r"\.(execute|executemany|fetch|fetchrow|fetchval|prepare|copy_records_to_table)\(\s*f[\"']")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    long = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(path)}
    assert {name: lines for name, lines in long.items() if lines > FUNCTION_LINES_MAX} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_says_what_it_is_and_stays_a_room(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "the first lines say what this file is and the rule it keeps"
    assert text.count("\n") <= FILE_LINES_MAX


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_stand_at_the_top(path: Path) -> None:
    hidden = [
        inner.lineno for f in functions(path) for inner in ast.walk(f) if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert hidden == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_are_listed_and_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    defined = {
        node.name: ast.get_docstring(node)
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    # An error's name and its line in the tree drawn above it are its documentation.
    errors = path.name == "errors.py"
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            listed = ast.literal_eval(node.value)
            undocumented = [name for name in listed if name in defined and not defined[name] and not errors]
            assert undocumented == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    # Two more do so by design: what reads the keys that upstreams.yaml names, and what starts processes.
    allowed = {"proxy/settings.py", "proxy/gateway/upstream_keys.py"}
    if name_of(path) in allowed or path.parent.name in {"local"}:
        return
    assert not re.search(r"\bos\.(environ|getenv)\b|\bfrom os import .*(environ|getenv)", path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_sql_is_never_built_from_text(path: Path) -> None:
    assert not SQL_CALLS.search(path.read_text()), "a value belongs in a bound parameter"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_float_is_called_money(path: Path) -> None:
    money = re.compile(
        r"\b(amount|balance|held|debt|charge|price|quote|credits)\s*:\s*float\b|\bfloat\((amount|balance|charge)"
    )
    assert not money.search(path.read_text())


@pytest.mark.parametrize("path", SQL, ids=name_of)
def test_a_definer_function_fixes_its_search_path(path: Path) -> None:
    text = path.read_text().lower()
    assert text.count("security definer") == len(re.findall(r"security definer\s+set search_path", text)) or (
        text.count("security definer") <= len(re.findall(r"set search_path", text))
    )


@pytest.mark.parametrize("path", [*MODULES, *SQL, *PROSE], ids=name_of)
def test_nothing_is_left_for_later(path: Path) -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text())


@pytest.mark.parametrize("path", PROSE, ids=name_of)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
