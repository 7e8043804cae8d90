"""Slots that refill against plain generation of one text at a time, cut afterwards: the same, whatever the shapes."""

import functools

import jax
import numpy as np
import pytest

import doubles
from sami_jax.config.mesh import MeshConfig
from sami_jax.model.decoder import make_model
from sami_jax.sampling.choosing import Choosing
from sami_jax.sampling.decoding import at_rest, go_on, join
from sami_jax.sampling.slots import Request, Room, Sampler, Spent
from sami_jax.sampling.stop_text import Response, Stops, cut_response
from sami_jax.scoring.matrices import all_logits
from sami_jax.sharding import batch_sharding, batch_shards, make_mesh, replicated
from tiny_models import FAMILIES, random_params

TOKENIZER = doubles.byte_tokenizer((".", "#"), ("Ċ", "Ċ"), ("Ġ", "T"), ("h", "e"), ("ĠT", "he"))
VOCAB = TOKENIZER.vocab_size
STOPS = Stops(frozenset({TOKENIZER.eos_id}), ("##", "\n\n", "é", "<s>"))
MOST = 21
GREEDY = Choosing()


def ids_of(*texts: str) -> list[int]:
    return [doubles.token(TOKENIZER, text) for text in texts]


def table() -> dict[str, np.ndarray]:
    """Letters, and now and then a piece of a marker or the end of the text, win over all other tokens."""
    params = doubles.table_params(VOCAB, seed=3)
    params["last"][:, ids_of(*"abcdefgh", " The", " ")] += 400
    params["last"][:, ids_of("#", ".#", "\n")] += 398
    params["last"][:, [*TOKENIZER.prompt_ids("é"), TOKENIZER.eos_id, *ids_of("<s>")]] += 396
    return params


def requests(count: int = 30, *, vocab: int = VOCAB, longest: int = 12) -> list[Request]:
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, longest + 1, count)
    drawn = [tuple(rng.integers(0, vocab, length).tolist()) for length in lengths]
    return [Request(ids, int(rng.integers(0, min(3, len(ids)))), np.zeros(2, np.uint32)) for ids in drawn]


def sample(
    asked: list[Request],
    *,
    decode=doubles.DECODE,
    params=None,
    mesh=None,
    slots: int = 8,
    row: int = 16,
    steps: int = 4,
    stops: Stops = STOPS,
    choosing: Choosing = GREEDY,
    vocab: int = VOCAB,
    spent: list[Spent] | None = None,
    hopeless=None,
) -> list[Response | None]:
    mesh = mesh or make_mesh(MeshConfig())
    sampler = Sampler(
        decode,
        table() if params is None else params,
        TOKENIZER,
        stops=stops,
        choosing=choosing,
        max_new_tokens=MOST,
        vocab_size=vocab,
        room=Room(slots, batch_shards(mesh), row, 12 + MOST, steps),
        sharding=batch_sharding(mesh),
        everywhere=replicated(mesh),
    )
    return sampler.responses(asked, (spent if spent is not None else []).append, hopeless=hopeless)


@functools.cache
def plainly(stops: Stops = STOPS) -> list[Response]:
    """By definition: `MOST` tokens of each, one after another, and the cut afterwards."""
    params, found = table(), []
    for request in requests():
        ids: list[int] = []
        while len(ids) < MOST:
            ids.append(int(np.argmax(doubles.logits_after(params, [*request.prompt, *ids]))))
        found.append(cut_response(ids, TOKENIZER, stops, prefix=request.prefix))
    return found


def test_the_cases_do_differ():
    lengths = [len(response.ids) for response in plainly()]
    assert 0 in lengths and max(lengths) >= MOST - 1 and len(set(lengths)) > 6
    assert {response.finished for response in plainly()} == {True, False}


@pytest.mark.parametrize(
    ("slots", "row", "steps"), [(1, 12, 1), (3, 12, 4), (8, 16, 4), (8, 64, 16), (32, 200, 5), (5, 31, MOST)]
)
def test_equals_plain_generation_whatever_the_shapes(slots, row, steps):
    assert sample(requests(), slots=slots, row=row, steps=steps) == plainly()


def test_order_changes_nothing():
    order = np.random.default_rng(0).permutation(len(requests()))
    shuffled = sample([requests()[i] for i in order])
    assert shuffled == [plainly()[i] for i in order]


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_devices_share_the_slots(mesh):
    assert sample(requests(), mesh=make_mesh(MeshConfig(**mesh))) == plainly()


def test_without_markers_only_end_tokens_end():
    stops = Stops(STOPS.end_ids, ())
    assert sample(requests(), stops=stops) == plainly(stops) != plainly()


def test_what_has_ended_makes_room_while_others_go_on():
    spent: list[Spent] = []
    sample(requests(), slots=4, row=16, steps=4, spent=spent)
    assert spent[-1].done == len(requests())
    assert spent[-1].kept == sum(len(response.ids) for response in plainly())
    assert [one.done for one in spent] == sorted(one.done for one in spent)
    # A batch runs until its last row has ended, which in most of eight batches of four runs out of tokens.
    batches = [plainly()[start : start + 4] for start in range(0, len(plainly()), 4)]
    static = sum(-(-max(MOST if not r.finished else len(r.ids) + 2 for r in batch) // 4) for batch in batches)
    assert spent[-1].chunks < 0.9 * static


def test_three_programs_serve_all_shards_of_a_shape():
    asked = requests()
    sample(asked[:9], slots=6, row=24, steps=3)
    before = [program._cache_size() for program in (at_rest, join, go_on)]
    for start in range(9, 30, 7):
        sample(asked[start : start + 7], slots=6, row=24, steps=3)
    assert [program._cache_size() for program in (at_rest, join, go_on)] == before


def test_nothing_asked_is_nothing_answered():
    assert sample([]) == []


class TestGivingUp:
    """Groups of two, of which one member decides."""

    @staticmethod
    def grouped(**how) -> list[Response | None]:
        asked = [request._replace(group=number // 2) for number, request in enumerate(requests())]
        return sample(asked, **how)

    @staticmethod
    def hopeless(so_far: str, ended: Response | None) -> bool:
        return "ch" in so_far or "hb" in so_far or (ended is not None and not ended.text)

    @pytest.mark.parametrize(("slots", "steps"), [(1, 4), (8, 4), (8, 1), (30, 7)])
    def test_what_is_left_is_what_would_have_been_kept(self, slots, steps):
        plain, spent = plainly(), []
        lost = {i // 2 for i, response in enumerate(plain) if self.hopeless(response.text, response)}
        assert 3 < len(lost) < 12
        found = self.grouped(slots=slots, steps=steps, hopeless=self.hopeless, spent=spent)
        assert spent[-1].done == len(plain)
        for group in range(len(plain) // 2):
            ours, theirs = found[2 * group : 2 * group + 2], plain[2 * group : 2 * group + 2]
            if group not in lost:
                assert ours == theirs
            else:
                there = [response for response in ours if response is not None]
                assert any(self.hopeless(r.text, r if r.finished else None) or not r.text for r in there)
        given_up = [i for i, response in enumerate(found) if response is None]
        assert given_up
        if slots == 1:  # the second of a pair never begins
            assert all(i % 2 for i in given_up)

    def test_it_takes_less(self):
        spent, all_of_it = [], []
        self.grouped(slots=4, hopeless=self.hopeless, spent=spent)
        self.grouped(slots=4, spent=all_of_it)
        assert spent[-1].chunks < 0.9 * all_of_it[-1].chunks


class TestDecoder:
    """A real decoder, in float32, whose sums come in another order in other shapes."""

    vocab = FAMILIES["mistral"].vocab_size
    stops = Stops(frozenset({1}), ("b",))

    def plain(self, model, params, asked: list[Request]) -> tuple[list[list[int]], list[np.ndarray]]:
        """Greedy ids of all texts, each scored whole at every step, and how far the best two logits lie apart."""
        width = 12 + MOST
        tokens, lengths = np.zeros((len(asked), width), np.int32), np.array([len(r.prompt) for r in asked])
        for row, request in enumerate(asked):
            tokens[row, : len(request.prompt)] = request.prompt
        logits_of = jax.jit(functools.partial(all_logits, model.rows))
        rows, margins = np.arange(len(asked)), []
        for count in range(MOST):
            logits = np.asarray(logits_of(params, tokens))[rows, lengths + count - 1]
            best = np.sort(logits, axis=-1)
            margins.append(best[:, -1] - best[:, -2])
            tokens[rows, lengths + count] = logits.argmax(-1)
        return [tokens[row, n : n + MOST].tolist() for row, n in enumerate(lengths)], list(np.array(margins).T)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_plain_generation_and_near_ties_are_counted(self, family):
        config = FAMILIES[family]
        params, asked = random_params(config), requests(20, vocab=config.vocab_size)
        ids, margins = self.plain(make_model(config), params, asked)
        expected = [cut_response(i, TOKENIZER, self.stops, prefix=r.prefix) for i, r in zip(ids, asked, strict=True)]
        assert len({len(response.ids) for response in expected}) > 3
        for axes, slots, row in (({}, 3, 16), ({}, 16, 64), ({"data": 2, "fsdp": 2, "tensor": 2}, 8, 16)):
            mesh = make_mesh(MeshConfig(**axes))
            model = make_model(config, mesh=mesh)
            shapes = {"slots": slots, "row": row, "steps": 4, "vocab": config.vocab_size}
            found = sample(asked, decode=model.decode, params=params, mesh=mesh, stops=self.stops, **shapes)
            differing = [i for i, (ours, plain) in enumerate(zip(found, expected, strict=True)) if ours != plain]
            ties = [i for i in differing if margins[i].min() < 1e-4]
            assert (differing, ties) == ([], [])
