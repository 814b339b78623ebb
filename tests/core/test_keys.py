"""core/keys.py: the key's format and what of it is stored."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.keys import KEY_CHARS, KEY_RANDOM_BYTES, PepperError, Peppers, hmac_of, new_key, parse_key, without_keys

BASE62 = string.digits + string.ascii_letters
RANDOM = st.binary(min_size=KEY_RANDOM_BYTES, max_size=KEY_RANDOM_BYTES)
PEPPER = b"a pepper of enough bytes"


@given(RANDOM)
def test_a_new_key_parses_to_its_own_id(random: bytes) -> None:
    key = new_key(random)

    parsed = parse_key(key.text)

    assert parsed is not None
    assert (parsed.id, parsed.text) == (key.id, key.text)
    assert len(key.text) == KEY_CHARS
    assert key.text.startswith(f"fb_{key.id}_{key.secret}_")


@given(RANDOM, st.integers(0, KEY_CHARS - 1), st.sampled_from(BASE62 + "_- \u0661\u00e9"))
def test_a_key_with_one_wrong_character_is_no_key(random: bytes, at: int, wrong: str) -> None:
    text = new_key(random).text
    changed = text[:at] + wrong + text[at + 1 :]

    assert (parse_key(changed) is None) == (changed != text)


@given(RANDOM, st.integers(0, KEY_CHARS - 2))
def test_a_key_with_two_characters_swapped_is_no_key(random: bytes, at: int) -> None:
    text = new_key(random).text
    swapped = text[:at] + text[at + 1] + text[at] + text[at + 2 :]

    assert (parse_key(swapped) is None) == (swapped != text)


@given(st.text())
def test_no_other_text_is_a_key(text: str) -> None:
    assert parse_key(text) is None


@pytest.mark.parametrize("tail", ["\n", " ", "\x00", "0"])
def test_nothing_may_follow_a_key(tail: str) -> None:
    assert parse_key(new_key(bytes(KEY_RANDOM_BYTES)).text + tail) is None


def test_the_secret_carries_all_256_bits() -> None:
    tail = bytes(KEY_RANDOM_BYTES - 32)

    secrets = {new_key(bit.to_bytes(32) + tail).secret for bit in [0, *(1 << n for n in range(256))]}

    assert len(secrets) == 257
    assert {len(secret) for secret in secrets} == {43}


def test_the_id_does_not_depend_on_the_secret() -> None:
    first = new_key(b"\x01" * 32 + b"\x07" * 16)
    second = new_key(b"\x02" * 32 + b"\x07" * 16)

    assert first.id == second.id
    assert first.secret != second.secret


@pytest.mark.parametrize("size", [0, KEY_RANDOM_BYTES - 1, KEY_RANDOM_BYTES + 1])
def test_a_key_is_made_from_exactly_the_bytes_it_needs(size: int) -> None:
    with pytest.raises(ValueError, match="48 random bytes"):
        new_key(bytes(size))


def test_the_hash_binds_pepper_id_and_secret() -> None:
    key = new_key(bytes(range(KEY_RANDOM_BYTES)))
    other_id = new_key(bytes(range(32)) + bytes(16))

    hashes = {
        hmac_of(PEPPER, key.text),
        hmac_of(PEPPER + b"!", key.text),
        hmac_of(PEPPER, other_id.text),
        hmac_of(PEPPER, new_key(bytes(KEY_RANDOM_BYTES)).text),
    }

    assert len(hashes) == 4
    assert {len(stored) for stored in hashes} == {32}
    assert hmac_of(PEPPER, key.text) == hmac_of(PEPPER, key.text)


def test_neither_a_parsed_key_nor_peppers_show_their_secrets() -> None:
    key = new_key(bytes(range(KEY_RANDOM_BYTES)))
    parsed = parse_key(key.text)

    assert key.secret not in repr(parsed)
    assert key.id in repr(parsed)
    assert "pepper of enough" not in repr(Peppers.parse(PEPPER.decode()))


@pytest.mark.parametrize(
    ("text", "by_version", "current"),
    [
        ("0123456789abcdef", {1: b"0123456789abcdef"}, 1),
        ("  0123456789abcdef\n", {1: b"0123456789abcdef"}, 1),
        ("with,comma and:colon", {1: b"with,comma and:colon"}, 1),
        ("1:0123456789abcdef", {1: b"0123456789abcdef"}, 1),
        (
            "2:fedcba9876543210, 1:0123456789abcdef",
            {1: b"0123456789abcdef", 2: b"fedcba9876543210"},
            2,
        ),
        (
            "1:with,comma and:colon,7:sixteen bytes or more",
            {1: b"with,comma and:colon", 7: b"sixteen bytes or more"},
            7,
        ),
    ],
)
def test_peppers_from_settings_text(text: str, by_version: dict[int, bytes], current: int) -> None:
    peppers = Peppers.parse(text)

    assert dict(peppers.by_version) == by_version
    assert peppers.current == current


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "version 1 has 0 bytes"),
        ("   ", "version 1 has 0 bytes"),
        ("short", "version 1 has 5 bytes"),
        ("1:short", "version 1 has 5 bytes"),
        ("1:0123456789abcdef,2:short", "version 2 has 5 bytes"),
        ("1:0123456789abcdef,1:fedcba9876543210", "version 1 is given twice"),
        ("0:0123456789abcdef", "from 1 to 32767, not 0"),
        ("32768:0123456789abcdef", "from 1 to 32767, not 32768"),
        ("9999999999999999999999:0123456789abcdef", "from 1 to 32767"),
    ],
)
def test_unusable_peppers_are_refused_by_name(text: str, problem: str) -> None:
    with pytest.raises(PepperError, match=problem):
        Peppers.parse(text)


def test_a_refused_pepper_is_not_repeated() -> None:
    with pytest.raises(PepperError) as refusal:
        Peppers.parse("1:hush-hush")

    assert "hush" not in str(refusal.value)


def test_moving_from_one_text_to_a_list_keeps_the_old_keys() -> None:
    key = new_key(bytes(range(KEY_RANDOM_BYTES))).text
    before = Peppers.parse("the very first pepper")
    after = Peppers.parse("1:the very first pepper,2:a second, longer pepper")

    assert hmac_of(before.by_version[1], key) == hmac_of(after.by_version[1], key)
    assert after.current == 2


@given(
    RANDOM, st.sampled_from(["", "/v1/", "The model '", "x"]), st.sampled_from(["", "' does not exist.", "zz", "\n"])
)
def test_an_error_that_repeats_a_key_doesnt_repeat_its_secret(random: bytes, before: str, after: str) -> None:
    key = new_key(random)
    text = without_keys(f"{before}{key.text}{after} {key.text[:40]}")
    assert key.secret[:16] not in text
    assert f"fb_{key.id}_[redacted]" in text
    assert without_keys(before + after) == before + after
