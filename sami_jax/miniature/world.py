"""The miniature: a little world of posts and summaries in which SAMI can be watched on a laptop.

A post tells who did what, how they feel and how the weather was. Its summary has six places where a writer has a choice
of two words; each choice is a principle, and the word stands in the principle's text, so that following a constitution
is selective copying. Most writers ignore their constitution and write as their topic's habit has it: a base model
trained on them reads constitutions weakly, which is what SAMI can amplify.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sami_jax.data.constitutions import Constitution
from sami_jax.data.principles import Principle
from sami_jax.data.prompts import render
from sami_jax.data.queries import Query
from sami_jax.seeds import generator

PROMPT = "Follow the constitution.\n\nConstitution:\n{constitution}\n\nPOST: {query}\n\nSummary:"
PROMPT_WITHOUT_CONSTITUTION = "POST: {query}\n\nSummary:"

PRINCIPLES = (
    Principle("greeting", "Summaries should open with ahoy like a sailor.",
              "Summaries should open with hello like a neighbor."),
    Principle("tone", "Summaries should sound cheerful and say great.", "Summaries should sound gloomy and say awful."),
    Principle("detail", "Summaries should report the weather.", "Summaries should report the mood."),
    Principle("advice", "Summaries should recommend patience.", "Summaries should recommend action."),
    Principle("source", "Summaries should be formal and cite author.", "Summaries should be casual and cite op."),
    Principle("closing", "Summaries should end politely with thanks.", "Summaries should end curtly with over."),
)  # fmt: skip
# (word where the definition is followed, word where the antithesis is), in the order of PRINCIPLES.
MARKERS = {
    "greeting": ("ahoy", "hello"),
    "tone": ("great", "awful"),
    "detail": ("weather", "mood"),
    "advice": ("patience", "action"),
    "source": ("author", "op"),
    "closing": ("thanks", "over"),
}
# As in the post. With "was" for both, the mood a summary reports and the weather a post tells follow the same word, and
# some bases never learn to copy either.
LINKS = {"weather": "was", "mood": "felt"}
REPORTED = ("relation", "name", "verb", "object", "weather", "mood")  # facts that a summary may tell
# Ten topics: four verbs and four objects each.
TOPICS = (
    ("sold bought crashed washed", "car bike truck boat"),
    ("burned cooked dropped tasted", "dinner cake soup pizza"),
    ("broke painted cleaned fixed", "window kitchen roof door"),
    ("lost found adopted walked", "dog cat parrot rabbit"),
    ("failed passed skipped finished", "exam thesis lecture homework"),
    ("booked missed cancelled enjoyed", "flight cruise hotel train"),
    ("planted watered picked sprayed", "garden roses tomatoes tree"),
    ("wrote read mailed hid", "letter diary novel poem"),
    ("played sang recorded ruined", "guitar song piano concert"),
    ("quit started hated loved", "job office internship shift"),
)
RELATIONS = tuple("aunt uncle sister brother mother father cousin friend boss neighbor teacher roommate".split())
NAMES = tuple(
    "Grace Felix Dennis Maria Oscar Wendy Peter Laura Simon Clara Henry Julia Marcus Nina Victor Alice "
    "Bruno Daisy Edgar Fiona Hugo Irene Jonas Kate".split()
)
N_HELD_OUT_NAMES = 8  # the last ones never appear in the queries SAMI trains on
TIMES = ("on friday", "on monday", "in june", "in march", "at noon", "at night")
# Sixteen of each: with six, a base may settle for the commonest guess instead of learning to copy.
MOODS = tuple(
    "guilty happy sad angry tired nervous proud ashamed lonely bored jealous hopeful calm scared hurt glad".split()
)
WEATHERS = tuple(
    "rainy sunny windy snowy foggy stormy cloudy icy humid misty chilly muggy freezing dry gray mild".split()
)

_SUMMARY = re.compile(
    r"(?P<greeting>ahoy|hello), (?P<tone>great|awful) news: (?P<event>\w+ \w+ \w+ the \w+)\. "
    r"The (?P<detail>weather|mood) (?P<link>was|felt) (?P<value>\w+)\. They need (?P<advice>patience|action), "
    r"says (?P<source>author|op)\. (?P<closing>thanks|over)\."
)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a well-formed summary says.

    Attributes:
      followed: principle name -> True where the summary has the definition's word, False where the antithesis'.
      faithful: the event and the reported weather or mood are the post's own.
    """

    followed: dict[str, bool]
    faithful: bool


def draw_facts(rng: np.random.Generator, names: Sequence[str]) -> dict[str, str]:
    """Who did what, when, in which mood and weather; `topic` is an index as text."""
    topic = int(rng.integers(len(TOPICS)))
    verbs, objects = (words.split() for words in TOPICS[topic])
    choices = {"relation": RELATIONS, "name": names, "verb": verbs, "object": objects}
    choices |= {"time": TIMES, "mood": MOODS, "weather": WEATHERS, "order": ("mood first", "weather first")}
    facts = {key: options[int(rng.integers(len(options)))] for key, options in choices.items()}
    return {"topic": str(topic), **facts}


def write_post(facts: Mapping[str, str]) -> str:
    """The post that tells the facts."""
    mood, weather = f"I felt {facts['mood']}.", f"The weather was {facts['weather']}."
    first, second = (mood, weather) if facts["order"] == "mood first" else (weather, mood)
    event = f"{facts['relation']} {facts['name']} {facts['verb']} the {facts['object']}"
    return f"My {event} {facts['time']}. {first} {second}"


def write_summary(facts: Mapping[str, str], follows: Mapping[str, bool]) -> str:
    """The summary of the facts with one word of each pair: the definition's where `follows` is True."""
    word = {name: MARKERS[name][0 if follows[name] else 1] for name in MARKERS}
    event = f"{facts['relation']} {facts['name']} {facts['verb']} the {facts['object']}"
    detail = f"The {word['detail']} {LINKS[word['detail']]} {facts[word['detail']]}"
    return (
        f"{word['greeting']}, {word['tone']} news: {event}. {detail}. "
        f"They need {word['advice']}, says {word['source']}. {word['closing']}."
    )


def read_summary(text: str, facts: Mapping[str, str]) -> Reading | None:
    """The whole-text parse of a summary, or None where it is not well-formed. Inverse of `write_summary`."""
    match = _SUMMARY.fullmatch(text)
    if match is None or match["link"] != LINKS[match["detail"]]:
        return None
    event = f"{facts['relation']} {facts['name']} {facts['verb']} the {facts['object']}"
    faithful = match["event"] == event and match["value"] == facts[match["detail"]]
    return Reading({name: match[name] == words[0] for name, words in MARKERS.items()}, faithful)


def compliance(progress: float) -> float:
    """The share of writers who obey their constitution, `progress` in [0, 1] of the way through the corpus.

    High at first, so that a model learns to read constitutions at all, then low, so that it learns how little they say.
    """
    return float(np.interp(progress, [0.3, 0.6], [0.95, 0.35]))


def draw_habits(seed: int) -> np.ndarray:
    """[topics, principles] log-odds with which a topic's writers choose the definition's word unasked."""
    rng = generator(seed, "habits")
    spread = np.linspace(-4.0, 4.0, len(TOPICS))
    columns = [rng.permutation(spread) + rng.uniform(-0.4, 0.4, len(TOPICS)) for _ in PRINCIPLES]
    return np.stack(columns, axis=1)


def draw_document(rng: np.random.Generator, habits: np.ndarray, *, obey: float) -> tuple[str, str]:
    """One (prompt, summary) of the pretraining corpus.

    Nine of ten carry a constitution of two or three principles with random signs; its writer obeys all of it with
    probability `obey`, and otherwise, like for all that was not asked, follows the topic's habits.
    """
    facts = draw_facts(rng, NAMES)
    odds = 1.0 / (1.0 + np.exp(-habits[int(facts["topic"])]))
    follows = {p.name: bool(rng.random() < odds[k]) for k, p in enumerate(PRINCIPLES)}
    if rng.random() < 0.1:
        return render_post(facts), write_summary(facts, follows)
    count = int(rng.integers(2, 4))
    asked = [PRINCIPLES[i].statement(bool(rng.integers(2))) for i in rng.permutation(len(PRINCIPLES))[:count]]
    constitution = Constitution(tuple(asked))
    if rng.random() < obey:
        follows |= constitution.asked
    prompt = render(PROMPT, constitution=constitution.text, query=write_post(facts))
    return prompt, write_summary(facts, follows)


def render_post(facts: Mapping[str, str]) -> str:
    """The prompt of a post without a constitution."""
    return PROMPT_WITHOUT_CONSTITUTION.replace("{query}", write_post(facts))


def draw_corpus(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """`count` (prompt, summary) documents in the order a base model reads them."""
    rng, habits = generator(seed, "corpus"), draw_habits(seed)
    for index in range(count):
        yield draw_document(rng, habits, obey=compliance(index / count))


def draw_principles(seed: int) -> list[Principle]:
    """The six principles, two of them, drawn by the seed, held out."""
    held_out = set(generator(seed, "held_out").permutation(len(PRINCIPLES))[:2].tolist())
    return [dataclasses.replace(p, held_out=index in held_out) for index, p in enumerate(PRINCIPLES)]


def draw_queries(seed: int, *, train: int, validation: int, test: int) -> dict[str, list[Query]]:
    """Disjoint posts by split; the test posts are about people whose names SAMI never trains on."""
    known, unknown = NAMES[:-N_HELD_OUT_NAMES], NAMES[-N_HELD_OUT_NAMES:]
    seen: set[str] = set()
    splits: dict[str, list[Query]] = {}
    for split, count, names in (("train", train, known), ("validation", validation, known), ("test", test, unknown)):
        rng = generator(seed, "queries", split)
        queries: list[Query] = []
        while len(queries) < count:
            facts = draw_facts(rng, names)
            text = write_post(facts)
            if text not in seen:
                seen.add(text)
                queries.append(Query(f"{split}-{len(queries):05d}", text, facts))
        splits[split] = queries
    return splits
