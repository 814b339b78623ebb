"""Chat requests: what is refused, what is found, and that a rewritten body differs only where it must."""

import base64
import contextlib
import json
import struct
import time
from typing import Any

import pytest

from proxy.core.catalog import PricedOptions
from proxy.core.chat import ChatRequest
from proxy.core.errors import InvalidRequest, Refusal, TooLarge
from proxy.core.media import Attachment, Image
from tests.core.limits import Limits

LIMITS = Limits()
HELLO = [{"role": "user", "content": "hello"}]


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "gpt-4o", "messages": HELLO, **fields}).encode()


def parse(raw: bytes, limits: Limits = LIMITS) -> ChatRequest:
    return ChatRequest.parse(raw, limits)


def refused(raw: bytes, limits: Limits = LIMITS) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(raw, limits)
    return caught.value


MINIMAL = b'{"model":"m","messages":[{"role":"user","content":"x"}]'


class TestMalformed:
    @pytest.mark.parametrize(
        ("raw", "says"),
        [
            (b"", "it is empty"),
            (b" " * 1_000_000, "it is empty"),
            (b"{", "line 1 column 2"),
            (MINIMAL, "column"),
            (MINIMAL + b',\n"n": }', "line 2 column 6"),
            (MINIMAL + b"} x", "from character"),
            (MINIMAL + b"}{}", "from character"),
            (MINIMAL + b',"x":01}', "column"),
            (MINIMAL + b',"x":"\x00"}', "column"),
            (MINIMAL + b',"x":NaN}', "NaN"),
            (MINIMAL + b',"x":[{"y":-Infinity}]}', "-Infinity"),
            (MINIMAL + b',"temperature":Infinity}', "Infinity"),
            (MINIMAL + b',"x":' + b"9" * 5000 + b"}", "digits"),
            (MINIMAL + b',"x":"\xff"}', "not UTF-8"),
            (MINIMAL + b',"x":"\xed\xa0\x80"}', "not UTF-8"),
            (b"\xef\xbb\xbf" + MINIMAL + b"}", "byte order mark"),
            ((MINIMAL + b"}").decode().encode("utf-16"), "byte order mark"),
            ((MINIMAL + b"}").decode().encode("utf-16-be"), "byte order mark"),
            ((MINIMAL + b"}").decode().encode("utf-32-le"), "byte order mark"),
            (b"nonsense", "character 0"),
            (b"\x00", "byte order mark"),
        ],
    )
    def test_it_is_a_400_that_says_where(self, raw: bytes, says: str) -> None:
        refusal = refused(raw)
        assert (refusal.status, refusal.code) == (400, "invalid_json")
        assert says in refusal.message

    @pytest.mark.parametrize("raw", [b"[]", b'"text"', b"5", b"null", b" true "])
    def test_json_that_is_no_object(self, raw: bytes) -> None:
        assert refused(raw).message == "The request body must be a JSON object."

    def test_a_body_above_the_limit_is_a_413_that_names_the_setting(self) -> None:
        refusal = refused(body(), Limits(body_bytes_max=10))
        assert isinstance(refusal, TooLarge)
        assert "larger than 10 bytes" in refusal.message
        assert "FAREBOX_BODY_BYTES_MAX" in refusal.message

    def test_nesting_above_the_limit_names_the_setting(self) -> None:
        nest = MINIMAL + b',"x":' + b"[" * 64 + b"]" * 64 + b"}"
        refusal = refused(nest)
        assert (refusal.status, refusal.code) == (400, "json_too_deep")
        assert "FAREBOX_JSON_DEPTH_MAX" in refusal.message
        assert refused(b'{"a":' * 200_000).code == "json_too_deep"

    def test_nesting_at_the_limit_and_brackets_in_strings_pass(self) -> None:
        parse(MINIMAL + b',"x":' + b"[" * 63 + b"]" * 63 + b"}")
        parse(body(messages=[{"role": "user", "content": "[{" * 500}]))

    @pytest.mark.parametrize(
        ("raw", "param"),
        [
            (MINIMAL + b',"model":"m"}', "model"),
            (MINIMAL + b',"n":1,"n":1}', "n"),
            (MINIMAL + b',"max_tokens":1,"\\u006dax_tokens":5}', "max_tokens"),
            (MINIMAL + b',"\\ud800":1,"\\ud800":2}', "\\ud800"),
            (MINIMAL + b',"stream":true,"stream_options":{"a":1,"a":2}}', "stream_options.a"),
            # The one reader sees a function, the other a search that the provider charges for.
            (MINIMAL + b',"tools":[{"type":"web_search","type":"function"}]}', "type"),
            (b'{"model":"m","messages":[{"role":"user","content":[{"image_url":"u"}],"content":"x"}]}', "content"),
            (MINIMAL + b',"x":[{"a":1,"\\u0061":2}]}', "a"),
        ],
    )
    def test_a_key_given_twice(self, raw: bytes, param: str) -> None:
        refusal = refused(raw)
        assert (refusal.code, refusal.param) == ("duplicate_key", param)
        json.dumps(refusal.body()).encode()

    def test_a_hosted_tool_beside_a_function(self) -> None:
        tool = {"type": "function", "function": {"name": "f"}, "googleSearch": {}}
        assert parse(body(tools=[tool])).options.hosted_tools == ("googleSearch",)

    @pytest.mark.parametrize("name", ["preset", "chat_template"])
    def test_what_stands_for_a_model_or_a_prompt(self, name: str) -> None:
        assert refused(body(**{name: "x"})).code == "unpriced_option"

    def test_many_keys_given_twice_take_no_time(self) -> None:
        keys = ",".join(f'"k{i}":0' for i in range(20_000)).encode()
        assert refused(MINIMAL + b',"x":{' + keys + b',"k19999":1}}').param == "k19999"

    @pytest.mark.parametrize(
        ("more", "param"),
        [
            ({"Model": "dearer"}, "model"),
            ({"N": 8}, "n"),
            ({"max_tokens": 1, "Max_Tokens": 9_000}, "max_tokens"),
            ({"max_tokens": 1, "maxTokens": 9_000}, "max_tokens"),
            ({"max_to\u212aens": 9_000}, "max_tokens"),  # the sign of Kelvin, which Go takes for a k
            ({"STREAM": True}, "stream"),
            ({"Service_Tier": "priority"}, "service_tier"),
            ({"Best_Of": 5}, "best_of"),
            ({"stream": True, "stream_options": {"Include_Usage": False}}, "stream_options.include_usage"),
            ({"tools": [{"type": "function", "Type": "web_search"}]}, "tools[].type"),
        ],
    )
    def test_a_key_that_other_parsers_take_for_one_that_is_priced(self, more: dict[str, Any], param: str) -> None:
        refusal = refused(body(**more))
        assert (refusal.code, refusal.param) == ("ambiguous_key", param)


class TestTypes:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("model", 5), ("model", ["m"]), ("messages", {}), ("messages", "hi"), ("stream", "true"), ("stream", 1),
            ("n", "2"), ("n", 2.0), ("n", True), ("n", [1]), ("max_tokens", "9"), ("max_tokens", 5.0),
            ("max_tokens", True), ("max_completion_tokens", {}), ("stream_options", []), ("stream_options", True),
            ("stream_options", {"include_usage": "yes"}), ("stream_options", {"include_usage": 1}), ("store", "true"),
            ("store", 1), ("service_tier", 5), ("tools", {}), ("tools", ["f"]), ("tools", [{"type": 5}]),
            ("functions", {}), ("response_format", "json"), ("response_format", {"type": 1}), ("modalities", "audio"),
            ("modalities", [1]), ("audio", "yes"), ("web_search_options", True), ("reasoning_effort", 3),
            ("prediction", "text"),
        ],
    )  # fmt: skip
    def test_a_wrong_type_names_the_field(self, field: str, value: Any) -> None:
        refusal = refused(body(**{field: value}))
        assert (refusal.status, refusal.code, refusal.param) == (400, "invalid_type", field)

    @pytest.mark.parametrize("field", ["model", "messages"])
    def test_what_is_required(self, field: str) -> None:
        for value in (None, "absent"):
            fields = {"model": "m", "messages": HELLO, field: value}
            if value == "absent":
                del fields[field]
            refusal = refused(json.dumps(fields).encode())
            assert (refusal.code, refusal.param) == ("missing_required_parameter", field)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": []}, "messages"),
            ({"n": 0}, "n"), ({"n": -1}, "n"), ({"n": 9}, "n"), ({"n": 10**30}, "n"),
            ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"),
            ({"max_tokens": 2**31 + 1}, "max_tokens"), ({"max_completion_tokens": 10**400}, "max_completion_tokens"),
            ({"model": ""}, "model"), ({"model": "x" * 257}, "model"), ({"model": "a\x00b"}, "model"),
            ({"model": "\ud800"}, "model"),
        ],
    )  # fmt: skip
    def test_a_value_out_of_bounds_names_the_field(self, fields: dict[str, Any], param: str) -> None:
        refusal = refused(body(**fields))
        assert (refusal.status, refusal.code, refusal.param) == (400, "invalid_value", param)

    def test_the_bound_of_n_names_its_setting(self) -> None:
        assert "FAREBOX_CHOICES_MAX" in refused(body(n=9)).message
        assert parse(body(n=8)).choices == 8

    def test_a_message_that_is_no_object(self) -> None:
        assert refused(body(messages=[*HELLO, "hi"])).param == "messages[1]"

    def test_messages_above_the_limit_name_the_setting(self) -> None:
        refusal = refused(body(messages=HELLO * 4), Limits(messages_max=3))
        assert isinstance(refusal, InvalidRequest)
        assert "FAREBOX_MESSAGES_MAX" in refusal.message
        assert parse(body(messages=HELLO * 3), Limits(messages_max=3)).messages_count == 3

    def test_null_is_as_good_as_absent(self) -> None:
        nulls = dict.fromkeys(
            [
                "stream",
                "stream_options",
                "n",
                "max_tokens",
                "max_completion_tokens",
                "store",
                "service_tier",
                "tools",
                "response_format",
                "modalities",
                "audio",
                "web_search_options",
                "reasoning_effort",
                "prediction",
            ]
        )
        request = parse(body(**nulls))
        assert (request.stream, request.choices, request.output_cap, request.usage_asked) == (False, 1, None, False)
        assert request.priced_options == PricedOptions()

    @pytest.mark.parametrize(
        "fields",
        [
            {"best_of": 5}, {"best_of": "1"}, {"use_beam_search": True}, {"num_beams": 4}, {"num_return_sequences": 2},
            {"deferred": True},
            {"models": ["other"]}, {"fallbacks": [{"model": "x"}]}, {"speed": "fast"}, {"modalities": ["image"]},
        ],
    )  # fmt: skip
    def test_what_multiplies_the_work_behind_the_price(self, fields: dict[str, Any]) -> None:
        refusal = refused(body(**fields))
        assert (refusal.status, refusal.code, refusal.param) == (400, "unpriced_option", next(iter(fields)))

    def test_its_harmless_values_pass(self) -> None:
        parse(body(best_of=1, use_beam_search=False, models=[], speed="standard", modalities=["text"]))


class TestFacts:
    def test_the_larger_cap_counts_whatever_name_it_has(self) -> None:
        request = parse(body(max_tokens=5, max_completion_tokens=9))
        assert (request.output_cap, request.cap_keys) == (9, ("max_tokens", "max_completion_tokens"))
        assert parse(body(max_tokens=5)).cap_keys == ("max_tokens",)
        assert parse(body(max_tokens=5, max_new_tokens=800)).output_cap == 800
        assert parse(body(max_new_tokens=5)).output_cap is None
        # A cap that another name lifts is none.
        assert parse(body(max_tokens=5, n_predict=-1)).output_cap is None

    def test_usage_is_asked_for_in_two_ways(self) -> None:
        assert parse(body(stream=True, stream_options={"include_usage": True})).usage_asked
        assert parse(body(stream=True, usage={"include": True})).usage_asked
        assert not parse(body(stream=True, stream_options={"include_usage": False})).usage_asked
        assert not parse(body(stream=True)).usage_asked

    def test_every_text_is_counted(self) -> None:
        messages = [
            {"role": "system", "content": "rules", "name": "boss"},
            {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "odd", "odd": {"k": "v"}}, "bare"]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "result"},
            {"role": "assistant", "function_call": {"name": "g", "arguments": "{}"}, "refusal": "no"},
        ]
        request = parse(
            body(
                messages=messages,
                tools=[{"type": "function", "function": {"name": "f"}}],
                documents=["extra"],
                user="u",
            )
        )
        for text in ("rules", "boss", "look", "k", "v", "bare", "hm", "f", '{"a":1}', "result", "g", "{}", "no"):
            assert text in request.texts
        assert '[{"type": "function", "function": {"name": "f"}}]' in request.texts
        assert '["extra"]' in request.texts
        assert not {"u", "gpt-4o", "user", "assistant"} & set(request.texts)
        assert (request.messages_count, request.calls_count, request.tools) == (5, 2, True)

    @pytest.mark.parametrize("name", ["Image_URL", "IMAGE_URL"])
    def test_a_picture_is_one_however_its_key_is_written(self, name: str) -> None:
        parts = [{"type": "image_url", name: {"url": "https://x/y.png"}}]
        assert len(parse(body(messages=[{"role": "user", "content": parts}])).images) == 1
        assert len(parse(body(messages=[{"role": "user", "Content": parts}])).images) == 1

    def test_a_role_that_is_no_role_is_counted(self) -> None:
        assert "x" * 500 in parse(body(messages=[{"role": "x" * 500, "content": ""}])).texts

    def test_options_that_cost(self) -> None:
        request = parse(
            body(
                service_tier="priority",
                web_search_options={},
                tools=[{"type": "function"}, {"type": "custom"}, {"type": "web_search"}, {"name": "odd"}],
                modalities=["text", "audio"],
                store=True,
                reasoning_effort="high",
                prediction={"type": "content", "content": "äb"},
                plugins=[{"id": "web"}],
                data_sources=[{"type": "search"}],
            )
        )
        assert request.options.hosted_tools == ("web_search", "unknown", "plugins", "data_sources")
        assert request.options.web_search == "web_search_options"
        assert request.options.reasoning_effort == "high"
        assert request.options.prediction_bytes == len("content") + 3
        assert request.priced_options == PricedOptions(
            service_tier="priority", web_search=True, hosted_tools=True, audio=True, store=True
        )

    @pytest.mark.parametrize("field", ["search_parameters", "search_context_size", "enable_search", "web_search"])
    def test_each_providers_way_to_search(self, field: str) -> None:
        assert parse(body(**{field: True})).options.web_search == field
        assert parse(body(**{field: None})).options.web_search is None

    def test_a_tool_without_a_type_but_with_a_function_is_a_function(self) -> None:
        assert parse(body(tools=[{"function": {"name": "f"}}])).options.hosted_tools == ()

    def test_cache_control_and_sealed_reasoning(self) -> None:
        part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
        assert parse(body(messages=[{"role": "user", "content": [part]}])).cache_control
        assert not parse(body()).cache_control
        sealed = {
            "role": "assistant",
            "content": "",
            "reasoning_details": [{"type": "x.encrypted", "data": "c2VhbGVk"}],
        }
        request = parse(body(messages=[sealed]))
        assert request.encrypted_reasoning
        assert "c2VhbGVk" in request.texts

    def test_the_kind_of_response_format(self) -> None:
        assert parse(body(response_format={"type": "json_schema", "json_schema": {"a": 1}})).response_format == (
            "json_schema"
        )
        assert parse(body()).response_format is None


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", 640, 480) + b"\x08\x02\x00\x00\x00" + b"\x00" * 50
GIF = b"GIF89a" + struct.pack("<HH", 33, 44) + b"\x00" * 30
EXIF = b"\xff\xe1" + struct.pack(">H", 9_000) + b"\x00" * 8_998
JPEG = b"\xff\xd8" + EXIF + b"\xff\xff\xc2\x00\x11\x08" + struct.pack(">HH", 700, 900) + b"\x03" + b"\x00" * 40
VP8X = b"RIFF\x00\x00\x00\x00WEBPVP8X" + b"\x00" * 8 + (1023).to_bytes(3, "little") + (767).to_bytes(3, "little")
VP8L = b"RIFF\x00\x00\x00\x00WEBPVP8L\x00\x00\x00\x00\x2f" + (99 | 49 << 14).to_bytes(4, "little") + b"\x00" * 9
VP8 = b"RIFF\x00\x00\x00\x00WEBPVP8 \x00\x00\x00\x00\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 320, 200)


class TestMedia:
    @pytest.mark.parametrize(
        ("kind", "content", "size"),
        [
            ("image/png", PNG, (640, 480)),
            ("image/gif", GIF, (33, 44)),
            ("image/jpeg", JPEG, (900, 700)),
            ("image/webp", VP8X, (1024, 768)),
            ("image/webp", VP8L, (100, 50)),
            ("image/webp", VP8, (320, 200)),
            ("image/png", PNG[:20], None),
            ("image/png", b"nothing known", None),
            ("image/jpeg", b"\xff\xd8\xff", None),
            ("image/png", PNG[:16] + b"\x00" * 30, None),
        ],
    )
    def test_a_pictures_size_is_read_from_its_header(self, kind: str, content: bytes, size: Any) -> None:
        part = {"type": "image_url", "image_url": {"url": data_url(kind, content), "detail": "high"}}
        request = parse(body(messages=[{"role": "user", "content": [part]}]))
        image = request.images[0]
        assert ((image.width, image.height) if image.width else None) == size
        assert image.detail == "high"
        assert image.bytes is not None
        assert abs(image.bytes - len(content)) <= 2
        assert request.text_bytes < len(request.body) - len(content)

    def test_what_is_given_by_url_is_unknown(self) -> None:
        parts = [
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            {"type": "image_url", "image_url": "https://example.org/a.png"},
            {"type": "image_url", "image_url": 5},
            {"type": "file", "file": {"file_id": "file-1"}},
            {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}},
        ]
        request = parse(body(messages=[{"role": "user", "content": parts}]))
        assert request.images == (Image(None), Image(None), Image(None))
        assert request.attachments == (Attachment("file", None), Attachment("video", None))
        assert request.audio_in  # a film may have sound

    def test_files_and_sound_are_measured(self) -> None:
        parts = [
            {"type": "file", "file": {"file_data": data_url("application/pdf", b"x" * 3_000), "filename": "a.pdf"}},
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"y" * 300).decode(), "format": "mp3"}},
        ]
        request = parse(body(messages=[{"role": "user", "content": parts}]))
        assert request.attachments == (Attachment("file", 3_000), Attachment("audio", 300))
        assert request.audio_in
        assert "a.pdf" in request.texts

    def test_a_data_url_anywhere_is_a_medium_and_no_text(self) -> None:
        url = data_url("image/png", PNG)
        messages = [{"role": "user", "content": [{"type": "input_image", "odd": [url]}]}]
        messages.append(
            {"role": "assistant", "content": "", "images": [{"type": "image_url", "image_url": {"url": url}}]}
        )
        request = parse(body(messages=messages))
        assert [(i.width, i.height) for i in request.images] == [(640, 480)] * 2
        assert url not in request.texts

    def test_a_data_url_that_is_the_prompt_is_text(self) -> None:
        url = data_url("image/png", PNG)
        assert url in parse(body(messages=[{"role": "user", "content": url}])).texts

    def test_a_spoken_answer_of_before_comes_back_as_sound(self) -> None:
        request = parse(body(messages=[{"role": "assistant", "audio": {"id": "audio_1"}}]))
        assert request.attachments == (Attachment("audio", None),)


ODD = b"""{ "messages" : [ {"role":"user","content":"\\ud800 \\u0000 \xc3\xa9<|endoftext|>", "x":1.0} ],
 "big": 123456789012345678901234567890, "exp":1E-7 , "temperature":0.10,
 "model" : "gpt-4o" , "stream":true, "zz": [1.50, -0.0] }\n """


class TestRewritten:
    def test_nothing_to_change_is_the_very_body(self) -> None:
        request = parse(ODD)
        assert request.rewritten() is ODD
        assert request.rewritten("gpt-4o") is ODD
        asked = parse(body(stream=True, stream_options={"include_usage": True}, max_tokens=5))
        assert asked.rewritten("gpt-4o", True, 5) is asked.body
        plain = parse(body())
        assert plain.rewritten("gpt-4o", True) is plain.body

    def test_only_the_touched_places_differ(self) -> None:
        tail = b'[1.50, -0.0],"stream_options":{"include_usage":true},"max_tokens":9 }'
        wanted = ODD.replace(b'"gpt-4o"', b'"up/\\u00e9"').replace(b"[1.50, -0.0] }", tail)
        assert parse(ODD).rewritten("up/é", True, 9, cap_key="max_tokens") == wanted

    @pytest.mark.parametrize(
        ("options", "merged"),
        [
            ("{}", '{"include_usage":true}'),
            ("{ }", '{ "include_usage":true}'),
            ("null", '{"include_usage":true}'),
            ('{"include_usage": false }', '{"include_usage": true }'),
            ('{"include_usage":null,"a":1.0}', '{"include_usage":true,"a":1.0}'),
            ('{"include_obfuscation" : false }', '{"include_obfuscation" : false,"include_usage":true }'),
            ('{"\\u0069nclude_usage":false}', '{"\\u0069nclude_usage":true}'),
        ],
    )
    def test_stream_options_are_merged(self, options: str, merged: str) -> None:
        raw = '{"model":"m","stream":true,"stream_options":%s,"messages":[{"content":"é"}]}'
        request = parse((raw % options).encode())
        assert request.rewritten("m", True) == (raw % merged).encode()

    def test_a_cap_is_inserted_replaces_null_and_lowers_what_is_above_it(self) -> None:
        assert parse(MINIMAL + b"}").rewritten(None, False, 7) == MINIMAL + b',"max_completion_tokens":7}'
        nulled = MINIMAL + b',"max_tokens":null}'
        assert parse(nulled).rewritten(None, False, 7, cap_key="max_tokens") == MINIMAL + b',"max_tokens":7}'
        both = MINIMAL + b',"max_tokens":5, "max_completion_tokens" : 50 }'
        assert parse(both).rewritten(None, False, 7) == MINIMAL + b',"max_tokens":5, "max_completion_tokens" : 7 }'
        assert parse(both).rewritten(None, False, 50) is both


class TestHostile:
    def test_text_that_tokenizers_and_databases_fear_passes(self) -> None:
        raw = MINIMAL[:-1] + b',{"role":"user","content":"\\u0000\\ud800<|endoftext|>"}]}'
        assert "\x00\ud800<|endoftext|>" in parse(raw).texts

    @pytest.mark.parametrize(
        "raw",
        [
            MINIMAL + b"," + b" " * 9_000_000 + b'"x":1}',
            MINIMAL + b',"x":"' + b"a" * 9_000_000 + b'"}',
            MINIMAL + b',"x":[' + b"[]," * 240_000 + b"[]]}",
            MINIMAL + b',"x":[' + b'"",' * 2_000_000 + b'""]}',
            MINIMAL + b',"x":"' + b'\\"' * 4_000_000 + b'"}',
            MINIMAL + b',"x":[' + b"[]," * 3_000_000 + b"[]]}",
            b"[" + (b"[" * 60 + b"]" * 60) * 70_000 + b"]",
            b'"' * 9_000_000,
            b"{" * 9_000_000,
            b"[" * 4_500_000 + b"]" * 4_500_000,
            MINIMAL + b',"x":' + b"1" * 4_000 + b"}",
        ],
        ids=[
            "blanks",
            "string",
            "arrays",
            "strings",
            "escapes",
            "more arrays",
            "peaks",
            "quotes",
            "braces",
            "nest",
            "digits",
        ],
    )
    def test_ten_megabytes_of_it_cost_little(self, raw: bytes) -> None:
        began = time.perf_counter()
        with contextlib.suppress(InvalidRequest):
            parse(raw)
        assert time.perf_counter() - began < 4
