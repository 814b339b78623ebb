"""YAML is read with positions; what would be a guess is refused, whatever the bytes are."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import yaml_reader
from proxy.core.catalog_files import load_catalog
from proxy.core.yaml_reader import FILE_BYTES_MAX, ConfigError, Listing, Node, Problems, Scalar, Table, read_yaml

UPSTREAMS = "upstreams: {a: {dialect: openai, base_url: 'https://h/v1', api_key: none}}"


def read(source: str | bytes) -> Node | None:
    problems = Problems("file")
    node = read_yaml(source, problems)
    problems.raise_if_any()
    return node


def problem(source: str | bytes) -> str:
    with pytest.raises(ConfigError) as error:
        read(source)
    (only,) = error.value.problems
    return str(only)


def test_every_value_knows_its_place() -> None:
    node = read("# prices\na: 1\n'b c':\n  - x\nd: {e: \"1\"}\n")
    assert isinstance(node, Table)
    assert list(node.entries) == ["a", "b c", "d"]
    assert node.entries["a"][1] == Scalar("1", plain=True, line=2, column=4)
    assert node.entries["b c"][1] == Listing(line=4, column=3)
    inner = node.entries["d"][1]
    assert isinstance(inner, Table)
    assert inner.entries["e"] == (Scalar("e", True, 5, 5), Scalar("1", False, 5, 8))


def test_a_number_stays_the_text_of_the_file() -> None:
    node = read("a: 0.1000000000000000055511151231257827\n")
    assert isinstance(node, Table)
    assert node.entries["a"][1] == Scalar("0.1000000000000000055511151231257827", True, 1, 4)


def test_windows_line_ends_and_a_byte_order_mark_are_no_matter() -> None:
    node = read(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert isinstance(node, Table)
    assert node.entries["b"][0] == Scalar("b", True, 2, 1)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", "file:1: the file is empty"),
        ("# nothing\n\n", "file:1: the file is empty"),
        ("a:\n\tb: 1\n", "file:2: a tab at the start of the line: YAML is indented with spaces"),
        ("a: 1\na: 2\n", "file:2: a: this key stands here twice (first on line 1)"),
        ("a: &x 1\n", "file:1: a: anchors and aliases (&name, *name) aren't read here; write the value out"),
        ("a: *x\n", "file:1: a: anchors and aliases (&name, *name) aren't read here; write the value out"),
        ("&x a: 1\n", "file:1: anchors and aliases (&name, *name) aren't read here; write the value out"),
        ("a:\n  <<: {b: 1}\n", "file:2: a: merge keys (<<) aren't read here; write the values out"),
        ("a: !!float 1\n", "file:1: a: the tag tag:yaml.org,2002:float isn't read here; leave it out"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "file:1: a: the tag tag:yaml.org,2002:python/object/apply:os.system",
        ),
        ("a: 1\n---\nb: 2\n", "file:2: a second document starts here; everything belongs into one"),
        ("? [a]\n: 1\n", "file:1: a key must be a word, not a list or a mapping"),
        (b"a: 1\nb: \xff\n", "file:2: byte 0xff isn't UTF-8; save the file as UTF-8"),
        (b"\xff\xfea\x00:\x00", "file:1: byte 0xff isn't UTF-8; save the file as UTF-8"),
        ("a: 1\nb: \x00\n", "file:2: the character U+0000 has no place in this file; delete it"),
        ("a: \x1b[0m", "file:1: the character U+001B has no place in this file; delete it"),
        ("a: \ud800", "file:1: the character U+D800 has no place in this file; delete it"),
        ("a: 1\u2028b: 2", "file:1: the character U+2028 has no place in this file; delete it"),
    ],
)
def test_what_is_refused_says_what_it_is(source: str | bytes, expected: str) -> None:
    assert problem(source).startswith(expected)


@pytest.mark.parametrize(
    "source", ["a: [1", "a: 'x", 'a: "\\q"', "a: b: c", "a: @x", "a: 1\n b: 2", "%YAML 9\n---\na", "]"]
)
def test_what_is_no_yaml_says_where(source: str) -> None:
    assert "this isn't YAML: " in problem(source)


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 20))
    assert "anchors and aliases" in problem("l0: &l0 [x]\n" + levels)


def test_depth_and_size_are_bounded() -> None:
    assert "nested more than 16 levels deep" in problem("{a: " * 20 + "1" + "}" * 20)
    assert "nested more than 16 levels deep" in problem("[" * 20_000 + "]" * 20_000)
    assert "a key must be a word" in problem("? " * 20_000)
    assert "a key must be a word" in problem("{[" * 20_000)
    assert "larger than 1,048,576 bytes" in problem("#" * (FILE_BYTES_MAX + 1))
    assert "larger than 1,048,576 bytes" in problem(b"#" * (FILE_BYTES_MAX + 1))


def test_messages_stay_on_one_line_and_short() -> None:
    assert len(problem("a: !<" + "x" * 5_000 + "> 1")) < 400
    assert len(problem(f"? {'k' * 5_000}\n: &x 1\n")) < 400
    assert "\n" not in problem("? |\n  a\n  b\n: &x 1\n")


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_no_bytes_do_more_than_be_refused(source: bytes) -> None:
    with pytest.raises(ConfigError):
        load_catalog(source, UPSTREAMS)
    with pytest.raises(ConfigError):
        load_catalog("", source)


# Pieces that mean something to YAML, so that most of what is made gets past its first line.
pieces = st.sampled_from(
    [
        *(
            "a",
            "b",
            ": ",
            "\n",
            "\n  ",
            "- ",
            "{",
            "}",
            "[",
            "]",
            ", ",
            "&x ",
            "*x",
            "!!str ",
            "'",
            '"',
            "\\",
            "|\n",
            ">-\n",
        ),
        *(
            "# ",
            "---\n",
            "...\n",
            "? ",
            "<<",
            "\t",
            "\r\n",
            "1",
            "0.5",
            "true",
            "~",
            "models",
            "upstream",
            "input",
            "\ufeff",
        ),
        *("%YAML 1.1\n", "\x00", "é", "\U0001f600", "@", "`"),
    ]
)


@given(st.lists(pieces, max_size=30).map("".join))
@settings(max_examples=1_000)
def test_no_text_means_two_things_to_the_two_parsers_of_pyyaml(text: str) -> None:
    """Where PyYAML has no libyaml the pure parser stands in. It may refuse more (a tab at a line's end), but what both
    take they take for the same: prices must not depend on how PyYAML was built."""
    fast, pure = _read_by(yaml_reader.LOADER, text), _read_by(yaml.SafeLoader, text)
    assert _REFUSED in (fast, pure) or fast == pure


_REFUSED = "refused"


def _read_by(loader: object, text: str) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml_reader, "LOADER", loader)
        try:
            return _bare(read(text))
        except ConfigError:
            return _REFUSED


def _bare(node: Node | None) -> object:
    """Without the places: the two differ on where a value is that isn't there."""
    if isinstance(node, Table):
        return {key: (name.plain, _bare(value)) for key, (name, value) in node.entries.items()}
    return (node.text, node.plain) if isinstance(node, Scalar) else type(node)
