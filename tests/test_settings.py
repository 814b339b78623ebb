"""Settings: what the environment says, and a start-up error that names the variable."""

from typing import Any

import pytest

from proxy.settings import Settings, SettingsError, load


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"FAREBOX_{name.upper()}", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)


def test_an_option_stands_above_the_environment_and_none_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_PORT", "1234")
    assert load().port == 1234
    assert load(port=None).port == 1234
    assert load(port=99).port == 99


@pytest.mark.parametrize("name", ["DATABASE_URL", "FAREBOX_DATABASE_URL"])
def test_a_database_has_two_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "postgresql://u:p@h/d")
    assert load().database_url == "postgresql://u:p@h/d"


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_PORT", "")
    monkeypatch.setenv("DATABASE_URL", "")
    assert (load().port, load().database_url) == (8080, None)


@pytest.mark.parametrize(
    ("value", "origins"),
    [
        ("*", ("*",)),
        ("https://a, https://b", ("https://a", "https://b")),
        ('["https://a"]', ("https://a",)),
        ("[]", ()),
    ],
)
def test_origins_are_words(monkeypatch: pytest.MonkeyPatch, value: str, origins: tuple[str, ...]) -> None:
    monkeypatch.setenv("FAREBOX_CORS_ORIGINS", value)
    assert load().cors_origins == origins


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "x"),
        ("PORT", "70000"),
        ("EXHAUSTED_STATUS", "403"),
        ("SHUTDOWN_SECONDS", "-1"),
        ("SHUTDOWN_SECONDS", "nan"),
        ("LIMITS_PROFILE", "wide"),
        ("BODY_BYTES_MAX", "0"),
        ("LOG_LEVEL", "loud"),
        ("CORS_ORIGINS", "[1"),
    ],
)
def test_a_wrong_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"FAREBOX_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load()
    assert f"FAREBOX_{name}: " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_wrong_value_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_PORT", "x")
    monkeypatch.setenv("FAREBOX_LOG_LEVEL", "x")
    with pytest.raises(SettingsError) as caught:
        load()
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KEY_PEPPER", "short-secret"),
        ("ADMIN_TOKEN", "short-secret"),
        ("WEBHOOK_SECRET", "whsec_short-secret"),
        ("WEBHOOK_SECRET", "short-secret"),
        ("WEBHOOK_SECRET", ", ,"),
        ("WEBHOOK_URL", "https://ann:short-secret@example.org/"),
        ("WEBHOOK_URL", "ftp://example.org/short-secret"),
        ("WEBHOOK_URL", "https:///short-secret"),
        ("WEBHOOK_URL", "https://example.org/short secret"),
        ("WEBHOOK_URL", "https://example.org:99999/short-secret"),
    ],
)
def test_a_secret_is_never_repeated(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"FAREBOX_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load()
    assert f"FAREBOX_{name}" in str(caught.value)
    assert value not in str(caught.value)
    assert "short-secret" not in str(caught.value)


def test_a_secret_is_not_shown() -> None:
    values: dict[str, Any] = {"key_pepper": "a-pepper-that-is-long", "admin_token": "x" * 40}
    assert "a-pepper-that-is-long" not in repr(load(**values))
    assert "x" * 40 not in repr(load(**values))


def test_messages_are_signed_with_each_of_several_secrets_or_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_WEBHOOK_URL", "https://example.org/hooks?token=1")
    with pytest.raises(SettingsError, match="FAREBOX_WEBHOOK_SECRET is needed") as caught:
        load()
    assert "token" not in str(caught.value)
    monkeypatch.setenv("FAREBOX_WEBHOOK_SECRET", f"whsec_{'A' * 32}, whsec_{'B' * 32}")
    assert [len(key) for key in load().signing_keys()] == [24, 24]
    assert "AAAA" not in repr(load())


def test_a_low_balance_is_decimal_credits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().low_balance is None
    monkeypatch.setenv("FAREBOX_LOW_BALANCE", "2.5")
    assert load().low_balance == 2_500_000
    monkeypatch.setenv("FAREBOX_LOW_BALANCE", "-1")
    with pytest.raises(SettingsError, match="FAREBOX_LOW_BALANCE: "):
        load()


@pytest.mark.parametrize("status", ["402", "429"])
def test_the_status_of_no_credits(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    monkeypatch.setenv("FAREBOX_EXHAUSTED_STATUS", status)
    assert load().exhausted_status == int(status)


@pytest.mark.parametrize("key", ["sk_test_abc", "sk_live_abc", "rk_test_51Hx", "rk_live_51Hx"])
def test_a_stripe_key_is_taken(key: str) -> None:
    assert load(stripe_key=key).stripe_key.get_secret_value() == key  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["pk_test_abc", "sk_prod_a", "whsec_abc", "sk_test_a b", "sk_test_ab\n", "sk_test_é"])
def test_another_key_is_not_and_is_not_repeated(key: str) -> None:
    with pytest.raises(SettingsError, match="FAREBOX_STRIPE_KEY: is no secret key of Stripe's") as error:
        load(stripe_key=key)
    assert key not in str(error.value)


def test_webhook_secrets_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_STRIPE_WEBHOOK_SECRETS", "whsec_old, whsec_new")
    assert [secret.get_secret_value() for secret in load().stripe_webhook_secrets] == ["whsec_old", "whsec_new"]


@pytest.mark.parametrize("secrets", ["whsec_,", "my-secret", "whsec_good,bad", '["whsec_good", ""]', "whsec_a b"])
def test_what_is_no_webhook_secret_is_refused_and_not_repeated(secrets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_STRIPE_WEBHOOK_SECRETS", secrets)
    with pytest.raises(SettingsError, match="FAREBOX_STRIPE_WEBHOOK_SECRETS: holds something that is no") as error:
        load()
    assert secrets not in str(error.value)


def test_live_money_goes_encrypted() -> None:
    assert load(stripe_key="sk_test_a", stripe_url="http://127.0.0.1:9/").stripe_url == "http://127.0.0.1:9"
    assert load(stripe_key="sk_live_a", stripe_url="https://stripe.example").stripe_url == "https://stripe.example"
    with pytest.raises(SettingsError, match="FAREBOX_STRIPE_URL must begin with https://"):
        load(stripe_key="sk_live_a", stripe_url="http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["stripe_url", "billing_url", "billing_return_urls"])
def test_an_address_that_cant_be_read_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FAREBOX_{name.upper()}", "https://user:password@example.com")
    with pytest.raises(SettingsError, match=f"FAREBOX_{name.upper()}: .* is no origin and path") as error:
        load()
    assert "password" not in str(error.value)
