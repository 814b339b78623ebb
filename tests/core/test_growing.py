"""Growing text: what is new since the last look, and all of it."""

from proxy.core.growing import GrowingText


def test_what_is_taken_is_still_there() -> None:
    text = GrowingText()
    assert (text.take(), text.chars, text.getvalue()) == ("", 0, "")
    text.fresh.write("so ")
    text.fresh.write("it ")
    assert (text.chars, text.getvalue()) == (6, "so it ")
    assert text.take() == "so it "
    assert text.take() == ""
    text.fresh.write("goéß🙂")
    assert (text.chars, text.getvalue()) == (11, "so it goéß🙂")
    assert (text.take(), text.take()) == ("goéß🙂", "")
    assert (text.chars, text.getvalue()) == (11, "so it goéß🙂")
