"""Stop conditions: ids, strings across token borders, and the text that is left."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.stops import StopCondition
from batchinfer.engine.types import SamplingParams

EOS = frozenset([0])


class Pieces:
    """A tokenizer whose token i is the i-th of some strings."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def detokenizer(self):
        return self

    def push(self, ids):
        return self.decode(ids)


class Silent(Pieces):
    def detokenizer(self):
        raise AssertionError("text is made while running, for nothing")


def run(condition, tokens):
    """Tokens up to the one that stops, and the text."""
    for count, token in enumerate(tokens, 1):
        if condition.push(token, count):
            return count, condition.text(tokens[:count])
    return None, condition.text(tokens)


def test_without_stop_strings_no_text_is_made_while_running():
    condition = StopCondition(SamplingParams(), EOS, Silent("", "a", "b"))
    assert run(condition, [1, 2, 1, 0]) == (4, "aba")


def test_a_stop_id_is_left_out_unless_included():
    for include, text in ((False, "a"), (True, "ab")):
        sampling = SamplingParams(stop_token_ids=(2,), include_stop=include)
        assert run(StopCondition(sampling, EOS, Silent("", "a", "b")), [1, 2]) == (2, text)


def test_ignored_end_of_sequence_and_no_stops_never_end():
    tokenizer = Silent("", "a")
    condition = StopCondition(SamplingParams(ignore_eos=True), EOS, tokenizer)
    assert condition.never and run(condition, [1, 0, 1]) == (None, "aa")
    assert not StopCondition(SamplingParams(), EOS, tokenizer).never
    assert not StopCondition(SamplingParams(ignore_eos=True, stop=("a",)), EOS, tokenizer).never


def test_the_string_complete_first_wins_and_of_those_the_longest():
    tokenizer = Pieces("", "xabcd")
    for stops, text in ((("abc", "b"), "xa"), (("b", "ab"), "x"), (("d", "cd"), "xab")):
        assert run(StopCondition(SamplingParams(stop=stops), EOS, tokenizer), [1]) == (1, text)


def test_a_stop_string_that_was_complete_before_min_tokens_does_not_stop_later():
    tokenizer = Pieces("", "ab", "c")
    sampling = SamplingParams(stop=("ab",), min_tokens=2)
    assert run(StopCondition(sampling, EOS, tokenizer), [1, 2, 2]) == (None, "abcc")
    assert run(StopCondition(sampling, EOS, tokenizer), [2, 1]) == (2, "c")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_where_it_stops_does_not_depend_on_where_tokens_end(pieces, stops, include):
    sampling = SamplingParams(stop=tuple(stops), include_stop=include)
    text = "".join(pieces)
    count, found = run(StopCondition(sampling, frozenset(), Pieces(*pieces)), list(range(len(pieces))))
    _, by_character = run(StopCondition(sampling, frozenset(), Pieces(*text)), list(range(len(text))))
    assert found == by_character
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    if not ends:
        assert count is None and found == text
    else:
        longest = max(len(s) for s in stops if text[: ends[0]].endswith(s))
        assert found == text[: ends[0] if include else ends[0] - longest]
        assert len("".join(pieces[:count])) >= ends[0] > len("".join(pieces[: count - 1]))


@pytest.mark.parametrize("stop", [("abc",), ("abc", "z")])
def test_text_that_only_looks_like_a_stop_string_is_kept(stop):
    tokenizer = Pieces("", "ab", "d", "c")
    assert run(StopCondition(SamplingParams(stop=stop), EOS, tokenizer), [1, 2, 1]) == (None, "abdab")
