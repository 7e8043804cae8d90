"""Every drop has its reason, and the last response is tested like the first."""

import dataclasses

import pytest

from sami_jax.config.data import FiltersConfig
from sami_jax.data.filters import REASONS, cannot_pass, cut_reasoning, drop_reason


@dataclasses.dataclass(frozen=True)
class Sampled:
    text: str
    finished: bool = True


FILTERS = FiltersConfig(placeholders=("[", "Response"), evasive_beginnings=("Sorry",), sentence_ends=".!?")
GOOD = Sampled("The post is fine.")
BAD = {
    Sampled(""): "empty",
    Sampled("The [insert] post."): "placeholder",
    Sampled("Response: a post."): "placeholder",
    Sampled("Sorry, no."): "evasive",
    Sampled("The post is"): "unfinished",
    Sampled("The post is fine.", finished=False): "unfinished",
    Sampled("The post is fine,"): "unfinished",
}


def test_good_responses_are_kept():
    assert drop_reason([GOOD, Sampled("Another one!")], FILTERS) is None
    assert drop_reason([GOOD, Sampled("A third?"), Sampled("Another one!")], FILTERS) is None


def test_reasoning_is_cut_at_the_first_marker():
    assert cut_reasoning("I think.\nAnswer: The post. Answer: no.", "Answer:") == "The post. Answer: no."
    assert cut_reasoning("Answer:", "Answer:") == ""
    assert cut_reasoning("I think, the answer: none.", "Answer:") is None
    assert drop_reason([GOOD, None], FILTERS) == "no_answer" == REASONS[1]


@pytest.mark.parametrize(("bad", "reason"), BAD.items(), ids=lambda x: getattr(x, "text", x))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_response_drops_the_query_wherever_it_stands(bad, reason, place):
    responses = [GOOD, Sampled("Another one!")]
    responses.insert(place, bad)
    assert drop_reason(responses, FILTERS) == reason


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2), (1, 2)])
def test_two_identical_responses_drop_the_query(first, second):
    responses = [Sampled("One."), Sampled("Two."), Sampled("Three.")]
    responses[second] = responses[first]
    assert drop_reason(responses, FILTERS) == "identical"


def test_the_first_reason_that_holds_is_given():
    everything = [Sampled("["), Sampled("["), Sampled("")]
    seen = [drop_reason(everything[start:], FILTERS) for start in (0, 2)]
    seen += [drop_reason(everything[:2], FILTERS), drop_reason([Sampled("Sorry"), Sampled("a")], FILTERS)]
    seen += [drop_reason([Sampled("a"), Sampled("a")], FILTERS)]
    seen += [drop_reason([Sampled("a."), Sampled("a.")], FILTERS)]
    assert seen == ["empty", "empty", "placeholder", "evasive", "unfinished", "identical"]
    assert ("too_long", "no_answer", *dict.fromkeys(seen)) == REASONS


def test_the_settings_decide():
    assert drop_reason([GOOD, Sampled("Response [1].")], FiltersConfig(placeholders=())) is None
    assert drop_reason([GOOD, Sampled("A line;")], FiltersConfig(sentence_ends=".;")) is None


@pytest.mark.parametrize(
    "filters", [FILTERS, FiltersConfig(placeholders=("[",), evasive_beginnings=("Sorry", "I can"))]
)
def test_a_beginning_that_cannot_pass_is_dropped_whatever_follows(filters):
    texts = ["Sorry, no.", "I cannot say.", "I may.", "See [1] there.", "A Response.", "Fine."]
    for text in texts:
        for count in range(len(text)):
            if cannot_pass(text[:count], filters):
                assert drop_reason([Sampled(text)], filters) in ("placeholder", "evasive")
                assert drop_reason([Sampled(text[:count] + " and so on.")], filters) in ("placeholder", "evasive")
    assert [cannot_pass(text, filters) for text in texts].count(True) >= 2
    assert not cannot_pass("", filters) and not cannot_pass("Fine.", filters)
