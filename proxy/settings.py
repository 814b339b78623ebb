"""Settings: everything an operator can set, read from FAREBOX_* variables here and nowhere else.

``load`` reads the environment, the CLI's options before it, and turns what pydantic finds wrong into one SettingsError
that names each variable. Below ``app.py`` nothing sees this class: objects are handed the values.

Units stand last in a name (``_seconds``, ``_bytes_max``). A secret is a SecretStr: no log or traceback shows it.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from proxy.core.keys import Peppers
from proxy.core.money import parse_credits
from proxy.core.return_urls import ReturnUrls
from proxy.core.webhook_signing import signing_key

__all__ = ["Settings", "SettingsError", "environment", "load"]

PREFIX = "FAREBOX_"
ADMIN_TOKEN_CHARS_MIN = 32
SECRETS = {"key_pepper", "admin_token", "stripe_key", "stripe_webhook_secrets", "webhook_url", "webhook_secret"}
STRIPE_KEY = re.compile(r"(sk|rk)_(test|live)_[A-Za-z0-9_]{1,240}")
WEBHOOK_SECRET = re.compile(r"whsec_[!-~]{1,240}")
ROLE_URLS = ("gateway_database_url", "control_database_url", "reader_database_url")


class SettingsError(ValueError):
    """Farebox can't start with these settings; the message has one line for each variable that is wrong."""


def _words(value: object) -> object:
    """``a, b`` -> ``("a", "b")``; a JSON list is taken, too."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return tuple(json.loads(value))
    return tuple(word for word in (part.strip() for part in value.split(",")) if word)


def _credits(value: object) -> object:
    """``"12.5"`` -> 12_500_000."""
    return parse_credits(value) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_words)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Port = Annotated[int, Field(ge=0, le=65_535)]


class Settings(BaseSettings):
    """What can be set, with its default. An empty variable counts as unset."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, populate_by_name=True
    )

    # Where the credits are.
    database_url: str | None = Field(None, validation_alias=AliasChoices("FAREBOX_DATABASE_URL", "DATABASE_URL"))
    """None: the embedded PostgreSQL in ``state_dir``."""
    gateway_database_url: str | None = None
    control_database_url: str | None = None
    reader_database_url: str | None = None
    """The same database by logins that may each act as one role only; None: ``database_url``."""
    state_dir: Path = Path(".farebox")
    """The embedded database, its demo key and locks."""
    key_pepper: SecretStr | None = None
    """What API keys are hashed under: one text, or several as ``1:TEXT,2:TEXT``; the highest version signs new keys."""
    reserve_seconds: Seconds = 5.0
    """How long a call waits for the ledger before it is answered 503, and a stream for more credits."""

    # What this machine knows before the database does.
    journal_dir: Path | Literal["off"] | None = None
    """Where charges are written down before they go to the database; None: ``journal`` in ``state_dir``. ``off``: no
    journal, for disks that don't outlive the process."""
    journal_bytes_max: int = Field(256 * 1024 * 1024, ge=64 * 1024)
    """Bytes, a process, that may wait for the database before no new work is taken."""
    journal_keep_seconds: float = Field(86_400, ge=0)
    """How long what is done is kept, for a database that forgets."""
    journal_kept_bytes_max: int = Field(1024 * 1024 * 1024, ge=0)
    """Bytes, in the whole directory, above which what is done goes earlier, the oldest first."""

    # What is sold, and through whom.
    pricing: Path = Path("pricing.yaml")
    upstreams: Path = Path("config/upstreams.yaml")
    reload_seconds: Seconds = 2.0
    """How often both files are looked at for a change."""

    # Listening.
    host: str = "127.0.0.1"
    port: Port = 8080
    metrics_host: str = "127.0.0.1"
    metrics_port: Port = 9464
    """0 switches the metrics listener off."""
    cors_origins: Words = ("*",)
    """Origins that browsers may call from; ``*`` is any, an empty JSON list none."""
    shutdown_seconds: Seconds = 25.0
    """How long running answers may go on after SIGTERM. Keep the orchestrator's grace period 20 s above it."""
    shutdown_delay_seconds: float = Field(0.0, ge=0, le=3_600)
    """How long requests are still taken after SIGTERM while /readyz says "not ready": for load balancers that poll."""
    restart_drain_seconds: Seconds = 7_200.0
    """How long running answers may go on in a worker that was replaced (SIGHUP): no answer lasts longer."""
    workers: int | None = Field(None, ge=1, le=64)
    """None: this process serves by itself. Otherwise it supervises so many processes that do."""

    # The admin API: off unless its token is set.
    admin_token: SecretStr | None = None

    # Messages out: off unless there is somewhere to send them.
    webhook_url: str | None = None
    """The operator's own endpoint, which is told what happens to accounts."""
    webhook_secret: SecretStr | None = None
    """What messages are signed with: ``whsec_`` and the base64 of 24 to 64 bytes; several with commas between them."""
    low_balance: Annotated[int | None, BeforeValidator(_credits)] = None
    """Credits (microcredits in here), below which an account's balance is told of."""

    # Stripe: off unless its key is set.
    stripe_key: SecretStr | None = None
    """A secret or restricted key; test mode and live mode follow from it."""
    stripe_webhook_secrets: Secrets = ()
    """What webhooks are signed with: one of these. Several while one is replaced by the next."""
    stripe_url: str | None = None
    """Another base address than Stripe's, for tests."""
    stripe_seconds: Seconds = 10.0
    """How long one attempt of a call to Stripe may take."""
    stripe_automatic_tax: bool = False
    stripe_invoice_creation: bool = False
    stripe_adaptive_pricing: bool = False
    stripe_promotion_codes: bool = False
    """Whether customers may enter promotion codes made at Stripe, whatever these take off."""
    billing_url: str | None = None
    """This server as customers reach it: where its own pages are that a payment returns to."""
    billing_return_urls: Words = ()
    """Where else a payment may return to: an origin and the beginning of a path, each."""

    # Limits on a request.
    body_bytes_max: int = Field(10 * 1024 * 1024, ge=1024)
    messages_max: int = Field(2_000, ge=1)
    json_depth_max: int = Field(64, ge=4)
    json_values_max: int = Field(100_000, ge=100)
    """How many values its JSON may hold: reading 100,000 takes some 50 ms."""
    choices_max: int = Field(8, ge=1, le=128)
    header_bytes_max: int = Field(32 * 1024, ge=1024)
    receive_seconds: Seconds = 30.0
    """How long a client may take to send its request."""
    key_calls_max: int = Field(1_000, ge=0)
    """How many calls of one key may run at once, in each process; 0: any number."""
    limits_profile: Literal["default", "chat"] = "default"
    """``chat``: 100 messages and 32 KiB for every key that names no profile of its own."""

    # Credits and answers.
    exhausted_status: Annotated[
        Literal[402, 429], BeforeValidator(lambda value: int(value) if str(value).isdigit() else value)
    ] = 402
    """The status of "out of credits". SDKs retry 429 up to three times."""
    affordable_cap_tokens_min: int = Field(64, ge=1)
    """The least output cap that is sent because a balance is short; below it the call is refused."""
    hold_step_tokens: int = Field(1_000, ge=0)
    """With how much output, for each choice, a stream's hold begins at most; 0: its whole maximum is held at once."""
    send_seconds: Seconds = 30.0
    """How long a client may not read before it counts as gone."""
    keepalive_seconds: float = Field(15.0, ge=0, le=3_600)
    """How long a stream may be silent before its client is sent a comment; 0: none is ever sent."""
    drains_max: int = Field(500, ge=0)
    """How many answers are read on at once for clients that left; one more is cut off and charged by count."""

    idempotency_key_days: int = Field(30, ge=1, le=36_500)
    """How long an Idempotency-Key is remembered."""
    idempotency_answer_seconds: float = Field(0, ge=0, le=7 * 86_400)
    """How long an answer is kept for a retry under its Idempotency-Key; 0: not at all."""
    idempotency_answer_bytes_max: int = Field(1024 * 1024, ge=1024, le=16 * 1024 * 1024)
    """The largest answer that is kept."""

    # `farebox demo` alone.
    demo_token_seconds: float = Field(0.02, ge=0, le=10)
    """The time its demo upstream takes for a token."""

    # Saying what happens.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"

    @field_validator("database_url", *ROLE_URLS)
    @classmethod
    def _database_url_can_be_read(cls, value: str | None) -> str | None:
        if value is not None:
            _check_database_url(value)
        return value

    @field_validator("key_pepper")
    @classmethod
    def _pepper_is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            Peppers.parse(value.get_secret_value())
        return value

    @field_validator("admin_token")
    @classmethod
    def _token_is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < ADMIN_TOKEN_CHARS_MIN:
            raise ValueError(f"is too short: at least {ADMIN_TOKEN_CHARS_MIN} characters")
        return value

    @field_validator("webhook_url")
    @classmethod
    def _webhook_url_can_be_posted_to(cls, value: str | None) -> str | None:
        if value is not None:
            _check_web_url(value)
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _webhook_secret_can_sign(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _signing_keys(value):
            raise ValueError("is empty")
        return value

    @model_validator(mode="after")
    def _messages_are_signed(self) -> Self:
        if self.webhook_url is not None and self.webhook_secret is None:
            raise ValueError(f"{PREFIX}WEBHOOK_SECRET is needed beside {PREFIX}WEBHOOK_URL: messages are signed")
        return self

    @field_validator("stripe_key")
    @classmethod
    def _stripe_key_is_one(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not STRIPE_KEY.fullmatch(value.get_secret_value()):
            raise ValueError("is no secret key of Stripe's: it begins with sk_test_, sk_live_, rk_test_ or rk_live_")
        return value

    @field_validator("stripe_webhook_secrets")
    @classmethod
    def _webhook_secrets_are_some(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        # A webhook that is signed with an empty secret anybody can sign: CVE-2026-41432.
        if not all(WEBHOOK_SECRET.fullmatch(secret.get_secret_value()) for secret in value):
            raise ValueError("holds something that is no webhook's secret: each begins with whsec_")
        return value

    @field_validator("stripe_url", "billing_url")
    @classmethod
    def _base_url_can_be_read(cls, value: str | None) -> str | None:
        return None if value is None else ReturnUrls((value,)).prefixes[0].rstrip("/")

    @field_validator("billing_return_urls")
    @classmethod
    def _return_urls_can_be_read(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return ReturnUrls(value).prefixes

    @model_validator(mode="after")
    def _live_money_goes_encrypted(self) -> Self:
        live = self.stripe_key is not None and "_live_" in self.stripe_key.get_secret_value()[:8]
        if live and self.stripe_url is not None and not self.stripe_url.startswith("https://"):
            raise ValueError(f"{PREFIX}STRIPE_URL must begin with https:// where the key is one of live mode")
        return self

    @model_validator(mode="after")
    def _role_urls_stand_beside_the_database_s(self) -> Self:
        given = [name for name in ROLE_URLS if getattr(self, name) is not None]
        if given and self.database_url is None:
            raise ValueError(f"DATABASE_URL is needed beside {PREFIX}{given[0].upper()}")
        return self

    def database_url_of(self, role: Literal["gateway", "control", "reader"]) -> str | None:
        """Where to log in to act as this role."""
        url: str | None = getattr(self, f"{role}_database_url")
        return url or self.database_url

    def journal_path(self) -> Path | None:
        """The journal's directory; None where there is to be none."""
        if self.journal_dir == "off":
            return None
        return self.journal_dir or self.state_dir / "journal"

    def signing_keys(self) -> tuple[bytes, ...]:
        """What messages out are signed with; none where no secret is set."""
        return () if self.webhook_secret is None else _signing_keys(self.webhook_secret)

    def peppers(self) -> Peppers | None:
        """The peppers that keys are hashed under; None where none is set."""
        return None if self.key_pepper is None else Peppers.parse(self.key_pepper.get_secret_value())


def _check_database_url(url: str) -> None:
    """Raises ValueError, without the URL in it: it holds a password."""
    try:
        parts = urlsplit(url)
        # Several hosts with commas between them are one URL to PostgreSQL, and none to urllib.
        readable = parts.scheme in {"postgresql", "postgres"} and ("," in parts.netloc or parts.port != 0)
    except ValueError:
        readable = False
    if not readable:
        raise ValueError("is not of the form postgresql://USER:PASSWORD@HOST:PORT/DATABASE") from None


def _check_web_url(url: str) -> None:
    """Raises ValueError, without the URL in it: it may hold a token."""
    try:
        parts = urlsplit(url)
        readable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        readable = False
    if not readable or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("is not of the form https://HOST/PATH") from None
    if "@" in parts.netloc:
        raise ValueError("must not have a name or a password in it: messages are signed")


def _signing_keys(secret: SecretStr) -> tuple[bytes, ...]:
    """Raises ValueError, without the secret in it."""
    parts = (part.strip() for part in secret.get_secret_value().split(","))
    return tuple(signing_key(part) for part in parts if part)


def environment() -> Mapping[str, str]:
    """The live environment, for what looks up the upstream keys that config/upstreams.yaml names."""
    return os.environ


def load(**options: Any) -> Settings:
    """The settings: ``options`` first (None leaves the environment's), then the environment. Raises SettingsError.

    A ``database_url`` among the options stands for every role that has none there, whatever the environment says.
    """
    values = {name: value for name, value in options.items() if value is not None}
    if "database_url" in values:
        values = dict.fromkeys(ROLE_URLS) | values
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_line(item) for item in error.errors(include_url=False))) from None


def _line(item: Any) -> str:
    """``FAREBOX_PORT: input should be ... (got 'x')``; the value of a secret is never shown."""
    field = str(item["loc"][0]) if item["loc"] else "settings"
    name = PREFIX + field.upper() if field in Settings.model_fields else field
    problem = item["msg"].removeprefix("Value error, ")
    # What is wrong with several at once has all of them for its input.
    secret = not item["loc"] or field in SECRETS or "URL" in name
    return f"{name}: {problem}" + ("" if secret or "input" not in item else f" (got {str(item['input'])[:80]!r})")
