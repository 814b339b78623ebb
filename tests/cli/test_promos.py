"""`farebox promo`: made, listed and ended."""

from uuid import uuid4

from tests.cli.conftest import Farebox


def test_a_code_is_made_listed_and_ended(farebox: Farebox) -> None:
    code = f"summer-{uuid4().hex[:8]}"
    made = farebox(
        *("promo", "create", "12.5", "--code", code, "--max", "100", "--starts", "2020-01-31"),
        *("--ends", "2031-01-31T12:00:00+01:00", "--last", "90d", "--json"),
    )
    assert made.code == 0, made.err
    view = made.json
    assert (view["id"], view["credits"], view["redemptions_max"]) == (code.upper(), "12.5", 100)
    assert (view["starts_at"], view["ends_at"]) == ("2020-01-31T00:00:00.000000Z", "2031-01-31T11:00:00.000000Z")
    assert (view["credits_seconds"], view["redeemed"], view["ended_at"]) == (90 * 86_400, 0, None)
    assert view["created_by"].startswith("cli:")
    assert view in farebox("promo", "list", "--json").json["data"]
    assert code.upper() in farebox("promo", "list").out
    ended = farebox("promo", "end", code, "--json").json
    assert ended == view | {"ended_at": ended["ended_at"]}
    assert ended["ended_at"] is not None


def test_without_a_code_one_is_made_up(farebox: Farebox) -> None:
    first, second = (farebox("promo", "create", "1", "--json").json["id"] for _ in range(2))
    assert first != second
    assert len(first) == len("XXXX-XXXX-XXXX")


def test_what_is_wrong_is_said(farebox: Farebox) -> None:
    assert farebox("promo", "create", "0").code == 2
    assert farebox("promo", "create", "1", "--starts", "tomorrow").code == 2
    backwards = farebox("promo", "create", "1", "--starts", "2027-02-01", "--ends", "2027-01-01", "--json")
    assert (backwards.code, backwards.json["error"]["code"]) == (1, "invalid_value")
    unknown = farebox("promo", "end", "nosuch", "--json")
    assert (unknown.code, unknown.json["error"]["code"]) == (1, "not_found")
