"""Upstream keys: found where they are now, named where they are missing, never shown."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.core.catalog import Upstream
from proxy.core.catalog_files import load_catalog
from proxy.core.errors import Unavailable
from proxy.gateway.upstream_keys import LOOK_SECONDS, UpstreamKeys

BY_VARIABLE = Upstream("openai", "openai", "https://api.openai.com/v1", api_key_env="OPENAI_API_KEY")
BY_FILE = Upstream("deepseek", "openai", "https://api.deepseek.com/v1", api_key_file="deepseek_key")
WITHOUT = Upstream("ollama", "openai", "http://127.0.0.1:11434/v1")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += LOOK_SECONDS


class Keyring:
    """A folder, an environment and a clock, and the keys that are found there."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "deepseek_key"
        self.environment: dict[str, str] = {}
        self.clock = Clock()
        self.keys = UpstreamKeys(self.environment, folder, monotonic=self.clock)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path)


def test_a_variable_is_read_live(keyring: Keyring) -> None:
    assert keyring.keys.missing(BY_VARIABLE) == "the environment variable OPENAI_API_KEY is not set"
    keyring.environment["OPENAI_API_KEY"] = " sk-one\n"
    assert keyring.keys.key(BY_VARIABLE) == "sk-one"
    keyring.environment["OPENAI_API_KEY"] = "sk-two"
    assert keyring.keys.key(BY_VARIABLE) == "sk-two"


def test_a_missing_key_is_unavailable_and_names_the_variable(keyring: Keyring) -> None:
    with pytest.raises(Unavailable, match="OPENAI_API_KEY") as refusal:
        keyring.keys.key(BY_VARIABLE)
    assert (refusal.value.status, refusal.value.code) == (503, "upstream_key_missing")
    assert not keyring.keys.has_key(BY_VARIABLE)


def test_an_upstream_that_wants_no_key_is_always_ready(keyring: Keyring) -> None:
    assert keyring.keys.key(WITHOUT) is None
    assert keyring.keys.has_key(WITHOUT)


@pytest.mark.parametrize("rename", [True, False])
def test_a_key_file_is_replaced_while_requests_run(keyring: Keyring, rename: bool) -> None:
    keyring.file.write_text("sk-one\n")
    assert keyring.keys.key(BY_FILE) == "sk-one"
    target = keyring.file.with_suffix(".new") if rename else keyring.file
    target.write_text("sk-two\n")
    target.replace(keyring.file)
    keyring.clock.tick()
    assert keyring.keys.key(BY_FILE) == "sk-two"


def test_a_key_file_that_appears_and_goes(keyring: Keyring) -> None:
    assert keyring.keys.missing(BY_FILE) == "the key file deepseek_key is missing"
    keyring.file.write_text("sk-one")
    keyring.clock.tick()
    assert keyring.keys.key(BY_FILE) == "sk-one"
    keyring.file.unlink()
    keyring.clock.tick()
    assert not keyring.keys.has_key(BY_FILE)


def test_the_file_is_looked_at_once_a_second_and_read_only_when_it_changed(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring.file.write_text("sk-one")
    monkeypatch.setattr("proxy.gateway.upstream_keys.time.time_ns", lambda: 2**63)
    assert keyring.keys.key(BY_FILE) == "sk-one"
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("read without need"))
    keyring.clock.tick()
    assert keyring.keys.key(BY_FILE) == "sk-one"
    monkeypatch.setattr(Path, "stat", lambda *_: pytest.fail("looked at within the second"))
    assert keyring.keys.key(BY_FILE) == "sk-one"


@pytest.mark.parametrize("value", ["sk-a\nsk-b", "sk é", "sk\x00", "k" * 5000, "sk one"])
def test_what_no_header_can_carry_is_no_key_and_is_not_shown(keyring: Keyring, value: str) -> None:
    keyring.environment["OPENAI_API_KEY"] = value
    reason = keyring.keys.missing(BY_VARIABLE)
    assert reason is not None
    assert "sk" not in reason
    keyring.file.write_text(value)
    assert not keyring.keys.has_key(BY_FILE)


def test_a_folder_a_pipe_and_an_empty_file_hold_no_key(keyring: Keyring) -> None:
    keyring.file.mkdir()
    assert not keyring.keys.has_key(BY_FILE)
    keyring.file.rmdir()
    os.mkfifo(keyring.file)
    keyring.clock.tick()
    assert not keyring.keys.has_key(BY_FILE)
    keyring.file.unlink()
    keyring.file.write_text("\n")
    keyring.clock.tick()
    assert keyring.keys.missing(BY_FILE) == "the key file deepseek_key is empty"


def test_the_routes_that_cannot_be_served_are_named_with_the_reason(keyring: Keyring) -> None:
    upstreams = """
upstreams:
  openai: {dialect: openai, base_url: "https://api.openai.com/v1", api_key_env: OPENAI_API_KEY}
  ollama: {dialect: openai, base_url: "http://127.0.0.1:11434/v1", api_key: none}
"""
    pricing = """
models:
  gpt-4o: {upstream: openai, input: 1, output: 3, max_output_tokens: 16384}
  llama: {upstream: ollama, input: 0, output: 0, max_output_tokens: 8192}
"""
    catalog = load_catalog(pricing, upstreams)
    assert keyring.keys.missing_routes(catalog) == {"gpt-4o": "the environment variable OPENAI_API_KEY is not set"}
    keyring.environment["OPENAI_API_KEY"] = "sk-one"
    assert keyring.keys.missing_routes(catalog) == {}


def test_an_absolute_path_is_taken_as_it_is(keyring: Keyring, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.write_text("sk-abs")
    assert keyring.keys.key(replace(BY_FILE, api_key_file=str(other))) == "sk-abs"
