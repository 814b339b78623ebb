"""`farebox pricing check`: what it says of a good file, a changed one and a broken one."""

from pathlib import Path

import pytest

from tests.cli.conftest import Farebox

ROOT = Path(__file__).parents[2]
PRICING = ROOT / "pricing.yaml"
UPSTREAMS = str(ROOT / "config" / "upstreams.yaml")


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """A copy of the repository's own pricing file, to be edited."""
    path = tmp_path / "pricing.yaml"
    path.write_text(PRICING.read_text())
    return path


def test_the_file_that_serves_is_fine(bare: Farebox) -> None:
    ran = bare("pricing", "check", str(PRICING), "--upstreams", UPSTREAMS, "--against", str(PRICING))
    assert ran.code == 0, ran.err
    assert ran.out.startswith("OK: ")


def test_an_equal_file_changes_nothing(bare: Farebox, edited: Path) -> None:
    ran = bare("pricing", "check", str(edited), "--upstreams", UPSTREAMS, "--against", str(PRICING))
    assert ran.code == 0
    assert "Nothing would change." in ran.out


def test_a_changed_price_is_shown_before_it_serves(bare: Farebox, edited: Path) -> None:
    edited.write_text(edited.read_text().replace("input: 1\n", "input: 5\n", 1))
    options = ["pricing", "check", str(edited), "--upstreams", UPSTREAMS, "--against", str(PRICING)]
    ran = bare(*options)
    assert ran.code == 0
    assert "input: 1 -> 5" in ran.out
    view = bare(*options, "--json").json
    assert view["ok"] is True
    assert view["version_before"] != view["version_after"]
    assert view["warnings"]


def test_a_broken_file_ends_with_1_and_names_the_place(bare: Farebox, edited: Path) -> None:
    edited.write_text(edited.read_text().replace("input: 1\n", "input: one\n", 1))
    ran = bare("pricing", "check", str(edited), "--upstreams", UPSTREAMS)
    assert ran.code == 1
    assert ran.out == ""
    assert str(edited) in ran.err
    assert "input" in ran.err
    assert bare("pricing", "check", str(edited), "--upstreams", UPSTREAMS, "--json").json["error"]["code"] == "pricing"


def test_a_file_to_compare_with_that_was_named_has_to_be_there(bare: Farebox, edited: Path, tmp_path: Path) -> None:
    """Or a typing error in its name would show as a list of new models, and no price as raised."""
    ran = bare("pricing", "check", str(edited), "--upstreams", UPSTREAMS, "--against", str(tmp_path / "none.yaml"))
    assert ran.code == 1
    assert "none.yaml" in ran.err


def test_a_file_that_is_not_there(bare: Farebox, tmp_path: Path) -> None:
    ran = bare("pricing", "check", str(tmp_path / "none.yaml"), "--upstreams", UPSTREAMS)
    assert ran.code == 1
    assert "none.yaml" in ran.err
