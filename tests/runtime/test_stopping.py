"""Stop strings: what is released, when, and that the cuts between pieces never matter."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_formats.errors import ConfigError
from mpo_runtime.text.stopping import StopMatcher

TEXT = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def slow_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the stop string that is completed first ends the text before it, the longest one of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_equals_the_definition_however_the_text_is_cut(text: str, stops: list[str], places: list[int]) -> None:
    matcher = StopMatcher(stops)
    released, stopped = "", False
    for piece in cut(text, places):
        part, stopped = matcher.push(piece)
        released += part
        if stopped:
            break
    expected, matched = slow_cut(text, stops)
    assert (released + matcher.flush(), matcher.matched) == (expected, matched)
    assert stopped == (matched is not None)


@given(TEXT, STOPS.filter(bool))
def test_holds_back_only_what_a_stop_string_may_begin_with(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    released = ""
    for index, character in enumerate(text):
        part, stopped = matcher.push(character)
        if stopped:
            return
        released += part
        seen = text[: index + 1]
        held = max(n for n in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - n :]) for s in stops))
        assert released == seen[: len(seen) - held]


def slow_cut_with_specials(pieces: list[tuple[str, bool]], stops: list[str]) -> tuple[str, bool]:
    """The definition: the first character, in the text alone or with special tokens spelled out, that completes a stop."""
    characters = [(character, special) for piece, special in pieces for character in piece]
    for end in range(1, len(characters) + 1):
        seen = characters[:end]
        everything = "".join(character for character, _ in seen)
        text = "".join(character for character, special in seen if not special)
        cuts = [
            sum(not special for _, special in seen[len(seen) - len(stop) :])
            for stop in stops
            if everything.endswith(stop)
        ]
        if not seen[-1][1]:
            cuts += [len(stop) for stop in stops if text.endswith(stop)]
        if cuts:
            return text[: len(text) - max(cuts)], True
    return "".join(character for character, special in characters if not special), False


@given(
    st.lists(st.tuples(st.text("a<>|", max_size=5), st.booleans()), max_size=8),
    st.lists(st.text("a<>|", min_size=1, max_size=5), max_size=4),
)
def test_special_tokens_count_without_being_text(pieces: list[tuple[str, bool]], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    released, stopped = "", False
    for piece, special in pieces:
        part, stopped = matcher.push(piece, special=special)
        released += part
        if stopped:
            break
    assert (released + matcher.flush(), stopped) == slow_cut_with_specials(pieces, stops)


def test_stops_that_are_special_tokens_or_span_them() -> None:
    for stops, released in (
        (["<|im_end|>"], "Hello.\n"),
        (["\n<|im_end|>"], "Hello."),
        ([".\n<|im_end|>\nuser"], "Hello"),
        (["<|im"], "Hello.\n"),
        (["\n\nuser"], "Hello."),  # in the text alone
    ):
        matcher = StopMatcher(stops)
        found = ""
        for piece, special in (("Hel", False), ("lo.\n", False), ("<|im_end|>", True), ("\nus", False), ("er", False)):
            text, stopped = matcher.push(piece, special=special)
            found += text
            if stopped:
                break
        assert stopped and found == released and matcher.matched == stops[0]


def test_without_stop_strings_everything_passes() -> None:
    matcher = StopMatcher()
    assert matcher.push("any text") == ("any text", False)
    assert matcher.push("<s>", special=True) == ("", False)
    assert not matcher.active
    assert (matcher.flush(), matcher.matched) == ("", None)


def test_pieces_are_released_late_and_dropped_after_the_stop() -> None:
    matcher = StopMatcher(["\nUser:", "END"])
    assert matcher.push("Hello\nUs") == ("Hello", False)
    assert matcher.push("e the E") == ("\nUse the ", False)
    assert matcher.push("NDless") == ("", True)
    assert matcher.push("more") == ("", True)
    assert (matcher.flush(), matcher.matched) == ("", "END")


@pytest.mark.parametrize("stops", [["b", "ab", "xxab"], ["ab", "b", "xxab"]])
def test_the_longest_of_those_completed_together_counts(stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert matcher.push("yxab") == ("yx", True)
    assert matcher.matched == "ab"


def test_flush_returns_what_was_held_and_starts_anew() -> None:
    matcher = StopMatcher(["abc"])
    assert matcher.push("xab") == ("x", False)
    assert matcher.flush() == "ab"
    assert matcher.push("c") == ("c", False)


def test_a_long_stop_string_takes_linear_time() -> None:
    """Quadratic work would take hours here."""
    stop = "a" * 200_000 + "b"
    matcher = StopMatcher([stop])
    assert matcher.push("a" * 400_000) == ("a" * 200_000, False)
    assert matcher.push("b") == ("", True)
    matcher = StopMatcher([stop])
    assert "".join(matcher.push("a")[0] for _ in range(20_000)) == ""


@pytest.mark.parametrize("stop", ["text", [""], ["a", ""], [3], [None]])
def test_bad_stop_strings_are_named(stop: Any) -> None:
    with pytest.raises(ConfigError, match="^stop"):
        StopMatcher(stop)
