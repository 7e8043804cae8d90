"""The miniature world: its grammar reads what it writes, its splits are disjoint, its seeds decide."""

import collections
import itertools

import numpy as np
import pytest

from sami_jax.miniature import world
from sami_jax.miniature.world import (
    MARKERS,
    NAMES,
    PRINCIPLES,
    TOPICS,
    compliance,
    draw_corpus,
    draw_document,
    draw_facts,
    draw_habits,
    draw_principles,
    draw_queries,
    read_summary,
    render_post,
    write_post,
    write_summary,
)
from sami_jax.seeds import generator

PATTERNS = [dict(zip(MARKERS, signs, strict=True)) for signs in itertools.product((True, False), repeat=len(MARKERS))]


def facts(seed: int = 0) -> dict[str, str]:
    return draw_facts(np.random.default_rng(seed), NAMES)


class TestGrammar:
    def test_reading_inverts_writing_for_all_patterns(self):
        assert len(PATTERNS) == 64
        for seed, follows in enumerate(PATTERNS):
            reading = read_summary(write_summary(facts(seed), follows), facts(seed))
            assert reading.followed == follows and reading.faithful

    def test_by_hand(self):
        told = {"relation": "aunt", "name": "Grace", "verb": "sold", "object": "car", "mood": "sad", "weather": "rainy"}
        expected = (
            "ahoy, great news: aunt Grace sold the car. The weather was rainy. They need patience, says author. thanks."
        )
        assert write_summary(told, dict.fromkeys(MARKERS, True)) == expected
        expected = "hello, awful news: aunt Grace sold the car. The mood felt sad. They need action, says op. over."
        assert write_summary(told, dict.fromkeys(MARKERS, False)) == expected

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("ahoy", "Ahoy"),
            ("ahoy", "hi"),
            ("great", "good"),
            (" news: ", " news:"),
            ("The weather was", "The weather is"),
            ("The weather was", "The climate was"),
            ("The weather was", "The weather felt"),
            ("The weather was", "The mood was"),
            (" was rainy", " was very rainy"),
            ("patience", "patience and action"),
            ("says author", "says nobody"),
            ("thanks.", "thanks"),
            ("thanks.", "thanks. "),
            ("thanks.", "thanks.\n"),
            ("thanks.", "thanks. thanks."),
            ("ahoy", " ahoy"),
            ("ahoy, ", "ahoy, ahoy, "),
            ("sold the car", "sold the red car"),
            ("sold the car", "sold a car"),
        ],
    )
    def test_near_misses_are_no_summaries(self, old, new):
        told = facts() | {"relation": "aunt", "verb": "sold", "object": "car", "weather": "rainy"}
        text = write_summary(told, dict.fromkeys(MARKERS, True))
        assert read_summary(text, told).faithful
        assert text.count(old) == 1
        assert read_summary(text.replace(old, new), told) is None

    @pytest.mark.parametrize("key", ["relation", "name", "verb", "object", "weather", "mood"])
    def test_another_posts_content_is_well_formed_but_not_faithful(self, key):
        told, follows = facts(), dict.fromkeys(MARKERS, True) | {"detail": key != "mood"}
        reading = read_summary(write_summary(told | {key: "other"}, follows), told)
        assert reading.followed == follows and not reading.faithful

    def test_the_mood_in_the_weathers_place_is_not_faithful(self):
        told, follows = facts(), dict.fromkeys(MARKERS, True)
        text = write_summary(told | {"weather": told["mood"]}, follows)
        assert not read_summary(text, told).faithful

    def test_every_marker_stands_in_its_principles_text_and_in_no_other(self):
        # Following a constitution is then copying a word from it.
        texts = {(p.name, True): p.definition for p in PRINCIPLES} | {(p.name, False): p.antithesis for p in PRINCIPLES}
        for name, words in MARKERS.items():
            for word, follows in zip(words, (True, False), strict=True):
                homes = {key for key, text in texts.items() if word in text.rstrip(".").split()}
                assert homes == {(name, follows)}, word
        assert [p.name for p in PRINCIPLES] == list(MARKERS)

    def test_posts_tell_all_that_summaries_need(self):
        for seed in range(50):
            told = facts(seed)
            post = write_post(told)
            assert all(told[key] in post for key in ("relation", "name", "verb", "object", "mood", "weather"))
            verbs, objects = TOPICS[int(told["topic"])]
            assert told["verb"] in verbs.split() and told["object"] in objects.split()
        assert len({write_post(facts(seed)) for seed in range(200)}) == 200
        swapped = facts() | {"order": "mood first"}
        assert write_post(swapped) != write_post(swapped | {"order": "weather first"})


class TestQueries:
    splits = draw_queries(3, train=300, validation=60, test=80)

    def test_counts_ids_and_facts(self):
        assert {split: len(queries) for split, queries in self.splits.items()} == {
            "train": 300,
            "validation": 60,
            "test": 80,
        }
        everything = [query for queries in self.splits.values() for query in queries]
        assert len({query.example_id for query in everything}) == len(everything)
        assert all(query.text == write_post(query.facts) for query in everything)

    def test_no_post_stands_twice_in_any_split(self):
        texts = [query.text for queries in self.splits.values() for query in queries]
        assert len(set(texts)) == len(texts)

    def test_posts_that_are_drawn_again_are_left_out(self, monkeypatch):
        # A world with one of everything but names, verbs and objects has 16 x 16 x 2 posts for training.
        for name in ("RELATIONS", "TIMES", "MOODS", "WEATHERS", "TOPICS"):
            monkeypatch.setattr(world, name, getattr(world, name)[:1])
        splits = draw_queries(0, train=300, validation=100, test=100)
        texts = [query.text for queries in splits.values() for query in queries]
        assert len(set(texts)) == len(texts) == 500

    def test_held_out_names_are_in_the_test_split_only(self):
        names = {split: {query.facts["name"] for query in queries} for split, queries in self.splits.items()}
        assert names["test"] == set(NAMES[-8:])
        assert names["train"] | names["validation"] == set(NAMES[:-8])

    def test_the_seed_decides(self):
        assert draw_queries(3, train=300, validation=60, test=80) == self.splits
        assert draw_queries(4, train=300, validation=60, test=80)["train"] != self.splits["train"]

    def test_the_first_queries_do_not_depend_on_how_many_are_drawn(self):
        assert draw_queries(3, train=100, validation=60, test=80)["train"] == self.splits["train"][:100]


class TestPrinciples:
    def test_two_are_held_out_by_the_seed(self):
        chosen = set()
        for seed in range(40):
            principles = draw_principles(seed)
            assert [p.name for p in principles] == list(MARKERS)
            held_out = tuple(p.name for p in principles if p.held_out)
            assert len(held_out) == 2
            chosen.add(held_out)
        assert len(chosen) > 8  # of 15 pairs
        assert draw_principles(5) == draw_principles(5)


class TestCorpus:
    def test_compliance_falls_from_high_to_low(self):
        values = [compliance(progress) for progress in np.linspace(0, 1, 21)]
        assert values == sorted(values, reverse=True)
        assert (compliance(0.0), compliance(0.3), compliance(0.6), compliance(1.0)) == (0.95, 0.95, 0.35, 0.35)
        assert compliance(0.45) == pytest.approx(0.65)

    def test_habits_are_seeded_and_balanced(self):
        habits = draw_habits(2)
        assert habits.shape == (len(TOPICS), len(PRINCIPLES))
        np.testing.assert_array_equal(habits, draw_habits(2))
        assert not np.array_equal(habits, draw_habits(3))
        # Each principle has the same spread of habits over the topics, so that none is free.
        assert np.abs(habits.mean(axis=0)).max() < 0.4 and (habits.max(axis=0) > 3).all()
        assert (habits.min(axis=0) < -3).all()

    def documents(self, *, obey: float, count: int = 600):
        rng = np.random.default_rng(0)
        habits = np.where(np.arange(len(PRINCIPLES)) % 2, 50.0, -50.0) * np.ones((len(TOPICS), 1))  # no doubt
        return [draw_document(rng, habits, obey=obey) for _ in range(count)]

    @staticmethod
    def asked(prompt: str) -> dict[str, bool]:
        return {p.name: p.definition in prompt for p in PRINCIPLES if p.definition in prompt or p.antithesis in prompt}

    @staticmethod
    def followed(summary: str) -> dict[str, bool]:
        words = summary.replace(",", " ").replace(".", " ").split()
        return {name: definition in words for name, (definition, _) in MARKERS.items()}

    def test_obedient_writers_follow_all_they_are_asked_and_their_habits_in_the_rest(self):
        habit = {p.name: bool(k % 2) for k, p in enumerate(PRINCIPLES)}
        sizes = collections.Counter()
        for prompt, summary in self.documents(obey=1.0):
            asked = self.asked(prompt)
            sizes[len(asked)] += 1
            assert self.followed(summary) == habit | asked
        assert set(sizes) == {0, 2, 3}
        assert 0.05 < sizes[0] / 600 < 0.15  # a tenth, within 4 standard errors of 0.012
        assert 0.37 < sizes[2] / 600 < 0.53  # half of the rest, 0.45 within 4 x 0.02

    def test_disobedient_writers_follow_their_habits(self):
        habit = {p.name: bool(k % 2) for k, p in enumerate(PRINCIPLES)}
        assert all(self.followed(summary) == habit for _, summary in self.documents(obey=0.0, count=100))

    def test_prompts_and_summaries_belong_together(self):
        for prompt, summary in draw_corpus(7, 100):
            assert prompt.endswith("\n\nSummary:")
            post = prompt.split("POST: ")[1].removesuffix("\n\nSummary:")
            event = summary.split("news: ")[1].split(".")[0]
            assert post.startswith(f"My {event} ")
            if "Constitution" in prompt:
                assert prompt.startswith(world.PROMPT.split("{constitution}")[0] + "1. ")
            else:
                assert prompt == f"POST: {post}\n\nSummary:"

    def test_signs_are_drawn_evenly(self):
        signs = [sign for prompt, _ in self.documents(obey=1.0) for sign in self.asked(prompt).values()]
        assert abs(np.mean(signs) - 0.5) < 4 * 0.5 / np.sqrt(len(signs))

    def test_the_seed_decides_and_a_corpus_is_read_once(self):
        corpus = list(draw_corpus(1, 50))
        assert list(draw_corpus(1, 50)) == corpus and list(draw_corpus(2, 50)) != corpus
        assert len(set(corpus)) == 50

    def test_the_corpus_uses_each_seeds_own_habits(self):
        rng = generator(1, "corpus")
        first = draw_document(rng, draw_habits(1), obey=compliance(0.0))
        assert next(iter(draw_corpus(1, 50))) == first

    def test_a_post_without_constitution(self):
        told = facts()
        assert render_post(told) == f"POST: {write_post(told)}\n\nSummary:"
