"""How a token is chosen: which ones may be drawn, by plain numpy; how often each is, against its exact probability."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from sami_jax.config.mesh import MeshConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.rendering import plain_prompt
from sami_jax.errors import BadConfigError
from sami_jax.files import read_json, read_jsonl
from sami_jax.huggingface.opened import load_model
from sami_jax.responding import respond
from sami_jax.run.single_stages import generate_file
from sami_jax.sampling.choosing import Choosing, choose, likely
from sami_jax.seeds import key_data
from test_slots import STOPS, plainly, requests, sample
from tiny_run import tiny_run_config

LOGITS = np.random.default_rng(0).normal(0.0, 2.0, (3, 40)).astype(np.float32)
KEYS = np.stack([key_data(7, "text", i) for i in range(3)])


def exact(logits: np.ndarray, choosing: Choosing) -> np.ndarray:
    """[V] probabilities in float64, by sorting and adding up."""
    scaled = logits.astype(np.float64) / choosing.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    kept, total = np.zeros(len(probs), bool), 0.0
    for token in np.argsort(-probs, kind="stable"):
        if total >= choosing.top_p:
            break
        kept[token] = probs[token] >= choosing.min_p * probs.max()
        total += probs[token]
    return np.where(kept, probs, 0) / probs[kept].sum()


HOWS = [
    Choosing(1.0),
    Choosing(0.5, top_p=0.8),
    Choosing(2.0, min_p=0.1),
    Choosing(1.3, top_p=0.9, min_p=0.05),
    Choosing(1.0, top_p=1e-6),
    Choosing(1e-30),
]


@pytest.mark.parametrize("how", HOWS)
def test_the_likely_tokens_are_those_of_the_definition(how):
    probs = jax.nn.softmax(likely(LOGITS, how), axis=-1)
    for row, expected in zip(np.asarray(probs), [exact(logits, how) for logits in LOGITS], strict=True):
        np.testing.assert_array_equal(row > 0, expected > 1e-30)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-7)


def test_the_bounds_do_cut():
    counts = [int((exact(LOGITS[0], how) > 0).sum()) for how in HOWS[:5]]
    assert counts[0] == 40 and 1 < counts[1] < 20 and 1 < counts[2] < 40 and counts[3] < counts[0] and counts[4] == 1


@pytest.mark.parametrize("how", HOWS[:4])
def test_tokens_are_drawn_as_often_as_their_probability_says(how):
    count = 20_000
    keys = np.stack([key_data(0, "draw", i) for i in range(count)])
    logits = np.broadcast_to(LOGITS[0], (count, 40))
    drawn = np.asarray(choose(logits, keys, np.zeros(count, np.int32), how))
    found, expected = np.bincount(drawn, minlength=40) / count, exact(LOGITS[0], how)
    # The largest of forty frequencies is within four and a half standard errors but once in 3000; the keys are fixed.
    assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-12).all()


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_lower_id():
    logits = np.array([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]], np.float32)
    np.testing.assert_array_equal(choose(logits, KEYS[:2], np.zeros(2, np.int32), Choosing()), [1, 0])


def test_a_draw_depends_on_its_key_and_place_alone():
    how, places = Choosing(1.0), np.array([0, 5, 9], np.int32)
    together = np.asarray(choose(LOGITS, KEYS, places, how))
    for i in range(3):
        np.testing.assert_array_equal(choose(LOGITS[i : i + 1], KEYS[i : i + 1], places[i : i + 1], how), together[i])
    flat = np.zeros((64, 40), np.float32)
    one_key = np.broadcast_to(KEYS[0], (64, 2))
    assert len(set(np.asarray(choose(flat, one_key, np.arange(64, dtype=np.int32), how)).tolist())) > 20
    keys = np.stack([key_data(0, i) for i in range(64)])
    assert len(set(np.asarray(choose(flat, keys, np.zeros(64, np.int32), how)).tolist())) > 20


def test_a_keys_data_is_that_of_its_name():
    assert key_data(1, "a", 2).dtype == np.uint32 and key_data(1, "a", 2).shape == (2,)
    different = [key_data(*names).tolist() for names in ((1, "a", 2), (1, "a", 3), (2, "a", 2), (1, "b", 2))]
    assert len({tuple(data) for data in different}) == 4
    assert different[0] == key_data(1, "a", 2).tolist()


def test_drawn_responses_are_the_same_whatever_the_shapes_and_the_order():
    how = Choosing(60.0, top_p=0.95)  # the table's logits are in the hundreds
    asked = [r._replace(key=key_data(0, i)) for i, r in enumerate(requests())]
    drawn = sample(asked, slots=8, row=16, steps=4, choosing=how)
    assert drawn != plainly(STOPS) and len({response.text for response in drawn}) > 20
    assert sample(asked, slots=3, row=12, steps=7, choosing=how) == drawn
    assert sample(asked[::-1], slots=32, row=64, steps=5, choosing=how) == drawn[::-1]
    other = [r._replace(key=key_data(1, i)) for i, r in enumerate(requests())]
    assert sample(other, slots=8, row=16, steps=4, choosing=how) != drawn


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_run_config(tmp_path_factory.mktemp("run"))
    drawn = dataclasses.replace(config.sampling, temperature=1.5, min_p=0.01, max_new_tokens=12)
    return dataclasses.replace(config, sampling=drawn)


class TestGenerate:
    @staticmethod
    def generated(config, folder: pathlib.Path, name: str, **changes) -> list[dict]:
        prompts, out = folder / "prompts.jsonl", folder / name
        prompts.write_text('{"prompt": "My sister"}\n{"prompt": "A trip to the sea"}\n')
        given = {"rows": 4, "samples": 3, **changes}
        return generate_file(config, model=config.model, prompts=prompts, out=out, **given)

    def test_several_samples_of_a_prompt_differ_and_are_the_same_again(self, config, tmp_path):
        lines = self.generated(config, tmp_path, "a.jsonl")
        assert [(line["prompt"], line["sample"]) for line in lines] == [
            (prompt, sample) for prompt in ("My sister", "A trip to the sea") for sample in range(3)
        ]
        assert len({tuple(line["response_ids"]) for line in lines}) == 6
        assert self.generated(config, tmp_path, "b.jsonl", rows=1) == lines
        # One sample alone is the first of several.
        first = self.generated(config, tmp_path, "c.jsonl", samples=1)
        assert [line["response_ids"] for line in first] == [line["response_ids"] for line in lines[::3]]
        seeded = dataclasses.replace(config, seed=config.seed + 1)
        assert self.generated(seeded, tmp_path, "d.jsonl") != lines
        counts = read_json(tmp_path / "a.jsonl.DONE.json")["counts"]
        how = {"temperature": 1.5, "top_p": 1.0, "min_p": 0.01}
        assert counts == {"responses": 6, "dropped": {"too_long": 0}, "samples": 3, "sampling": how}
        assert len(read_jsonl(tmp_path / "a.jsonl")) == 6

    def test_what_would_give_the_same_each_time_is_refused(self, config, tmp_path):
        greedy = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, temperature=0.0))
        with pytest.raises(BadConfigError, match="--samples=3 would give the same response.*temperature is 0"):
            self.generated(greedy, tmp_path, "a.jsonl")
        with pytest.raises(BadConfigError, match="--format=authors has one response.*leave out --samples=3"):
            self.generated(config, tmp_path, "a.jsonl", format="authors")

    def test_a_draw_without_a_name_is_refused(self, config):
        loaded = load_model(pathlib.Path(config.model), MeshConfig(), "float32")
        with pytest.raises(ValueError, match="need a name"):
            respond(loaded, [plain_prompt(loaded.tokenizer, "a")], SamplingConfig(temperature=1.0))
