"""The miniature's judge: what a response follows, and how malformed ones lose; and which judges a config may name."""

import re

import pytest

from sami_jax.config.chat import ChatConfig
from sami_jax.config.evaluation import EvaluationConfig
from sami_jax.config.fields import describe_fields
from sami_jax.config.run import RunConfig
from sami_jax.data.constitutions import Constitution
from sami_jax.data.queries import Query
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.evaluation.judge_by_name import JUDGES, judge_by_name
from sami_jax.evaluation.miniature_judge import MINIATURE, judge_miniature
from sami_jax.evaluation.verdicts import Verdict
from sami_jax.miniature.world import MARKERS, PRINCIPLES, REPORTED, draw_queries, write_summary

[QUERY] = draw_queries(0, train=1, validation=0, test=0)["train"]
BY_NAME = {p.name: p for p in PRINCIPLES}
# Asks for the definition of tone and the antithesis of closing, and for nothing else.
CONSTITUTION = Constitution((BY_NAME["closing"].statement(False), BY_NAME["tone"].statement(True)))


def summary(**follows: bool) -> str:
    return write_summary(QUERY.facts, dict.fromkeys(MARKERS, True) | follows)


@pytest.mark.parametrize(
    ("follows", "followed", "adherence"),
    [
        ({"tone": True, "closing": False}, {"closing": True, "tone": True}, 1.0),
        ({"tone": False, "closing": False}, {"closing": True, "tone": False}, 0.5),
        ({"tone": True, "closing": True}, {"closing": False, "tone": True}, 0.5),
        ({"tone": False, "closing": True}, {"closing": False, "tone": False}, 0.0),
    ],
)
def test_adherence_is_the_share_of_what_was_asked(follows, followed, adherence):
    for detail in (True, False):  # what the constitution does not ask for does not count
        verdict = judge_miniature(QUERY, CONSTITUTION, summary(**follows, detail=detail))
        assert verdict == Verdict(True, True, followed)
        assert (verdict.adherence, verdict.score, verdict.strict_score) == (adherence,) * 3


def test_wrong_content_costs_the_strict_score_only():
    other = QUERY.facts | {"name": "Nobody"}
    verdict = judge_miniature(
        QUERY, CONSTITUTION, write_summary(other, dict.fromkeys(MARKERS, True) | {"closing": False})
    )
    assert (verdict.well_formed, verdict.faithful) == (True, False)
    assert (verdict.score, verdict.strict_score) == (1.0, -1.0)


@pytest.mark.parametrize("response", ["", "great over", "news " * 20])
def test_a_malformed_response_follows_nothing_and_loses_against_any_other(response):
    malformed = judge_miniature(QUERY, CONSTITUTION, response)
    assert malformed == Verdict(False, False, {"closing": False, "tone": False})
    worst = judge_miniature(QUERY, CONSTITUTION, summary(tone=False, closing=True))
    assert malformed.adherence == 0.0 and malformed.score < worst.score
    assert malformed.strict_score == -1.0


def test_a_query_of_another_world_is_refused_with_the_remedy():
    with pytest.raises(BadDataError, match=r"Query 'reddit-1' has no fact '\w+'.*set config.evaluation.judge=none"):
        judge_miniature(Query("reddit-1", "Who knows?"), CONSTITUTION, summary())


def test_foreign_data_is_refused_before_any_response_is_there():
    names, bare = list(BY_NAME), Query("reddit-1", "Who knows?")
    MINIATURE.check([QUERY], names)
    with pytest.raises(BadDataError, match="Query 'reddit-1' has no fact 'relation'.*set config.evaluation.judge=none"):
        MINIATURE.check([QUERY, bare], names)
    with pytest.raises(BadDataError, match=r"principle 'brief' is none of the miniature world's.*judge=none"):
        MINIATURE.check([QUERY], [*names, "brief"])


def test_the_facts_that_are_asked_for_are_those_that_are_read():
    read = set()

    class Noting(dict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    for detail in (True, False):
        judge_miniature(Query("q", "", Noting(QUERY.facts)), CONSTITUTION, summary(detail=detail))
    assert read == set(REPORTED)


def test_judges_by_name():
    assert judge_by_name("none") is None and judge_by_name("miniature") is MINIATURE
    assert judge_by_name("server") is None and judge_by_name("model:judge") is None  # they compare pairs
    assert MINIATURE.judge is judge_miniature


@pytest.mark.parametrize("judge", ["gpt", "", "model:", "replay:", "server:x", "miniature:x", "Model:x"])
def test_an_unknown_judge_is_refused_and_the_known_are_listed(judge):
    known = "choose one of none, miniature, server, model:DIR, replay:FILE"
    with pytest.raises(BadConfigError, match=f"config.evaluation.judge is {judge!r}; {known}"):
        EvaluationConfig(judge=judge)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"judge": "server"}, "judge_model names no model"),
        ({"judge_model": "big"}, "the judge is 'none'; set judge=server"),
        ({"judge": "model:x", "base_url": "http://x"}, "the judge is 'model:x'; set judge=server"),
        ({"instruct": "x"}, "config.evaluation.judge=none"),
        ({"judge": "model:x", "temperature": 0.5}, "a model on these devices is greedy"),
        ({"judge": "server", "judge_model": "big", "base_url": "x"}, "base_url is 'x'"),
        ({"judge": "server", "judge_model": "big", "max_cost_usd": 1.0}, "a price is missing"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(settings, sentence):
    with pytest.raises(BadConfigError, match=re.escape(sentence)):
        EvaluationConfig(**settings)


def test_who_is_asked():
    server = EvaluationConfig(judge="server", judge_model="big", base_url="http://x/v1", concurrency=3)
    assert server.chat == ChatConfig(chat_model="big", base_url="http://x/v1", concurrency=3)
    assert EvaluationConfig(judge="model:folder", max_tokens=9).chat == ChatConfig(model="folder", max_tokens=9)
    assert EvaluationConfig(judge="replay:log").chat == ChatConfig(model="replay:log")
    asked = [EvaluationConfig(judge=judge).is_asked for judge in ("none", "miniature", "model:x", "replay:x")]
    assert asked == [False, False, True, True]


def test_the_help_text_names_every_judge():
    meaning = next(text for name, _, text in describe_fields(RunConfig) if name == "config.evaluation.judge")
    assert all(f"{name}: " in meaning for name in (*JUDGES, "none", "server", "model:DIR"))
