"""Greedy sampling against a numpy loop that extends one row at a time, and the cut at stop markers."""

import functools

import chex
import jax
import numpy as np
import pytest

import doubles
from sami_jax.data.prompts import Prompt
from sami_jax.data.tokenizer import Tokenizer
from sami_jax.sampling import Stops, cut_response, greedy, make_stops, sample_responses

VOCAB = 13
# Ties among integer logits would be settled alike by numpy and jax (the lower id), so no seed has to avoid them.
PARAMS = doubles.table_params(VOCAB)
NO_STOP = np.zeros(VOCAB, bool)
PROMPTS = ([3], [5, 1, 7, 7, 2], [0, 0], [12, 4, 9])


def numpy_greedy(prompt: list[int], stop_mask: np.ndarray, max_new_tokens: int) -> tuple[list[int], bool]:
    emitted: list[int] = []
    while len(emitted) < max_new_tokens:
        emitted.append(int(np.argmax(doubles.logits_after(PARAMS, [*prompt, *emitted]))))
        if stop_mask[emitted[-1]]:
            return emitted, True
    return emitted, False


def sampled_rows(
    prompts,
    stop_mask: np.ndarray = NO_STOP,
    *,
    width: int = 6,
    pad: int = 0,
    max_new_tokens: int = 8,
    decode=doubles.DECODE,
) -> list[tuple[list[int], bool]]:
    tokens = np.full((len(prompts), width), pad, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    samples = greedy(decode, PARAMS, tokens, lengths, stop_mask, max_new_tokens=max_new_tokens)
    chex.assert_shape(samples.tokens, (len(prompts), max_new_tokens))
    return [
        (np.asarray(row)[:length].tolist(), bool(stopped))
        for row, length, stopped in zip(samples.tokens, samples.lengths.tolist(), samples.stopped, strict=True)
    ]


class TestGreedy:
    def test_ragged_prompts_equal_a_numpy_loop_row_by_row(self):
        assert sampled_rows(PROMPTS) == [numpy_greedy(prompt, NO_STOP, 8) for prompt in PROMPTS]

    def test_each_row_ends_with_its_own_stop_token(self):
        # Tokens that some rows emit early, others late, and one never.
        expected = []
        for stop in range(VOCAB):
            mask = np.arange(VOCAB) == stop
            expected.append([numpy_greedy(prompt, mask, 8) for prompt in PROMPTS])
            assert sampled_rows(PROMPTS, mask) == expected[-1]
        lengths = {(len(ids), stopped) for rows in expected for ids, stopped in rows}
        assert {(1, True), (8, False)} < lengths and len(lengths) > 4  # the cases do differ

    def test_the_token_limit_ends_rows_unstopped(self):
        assert sampled_rows(PROMPTS, max_new_tokens=1) == [numpy_greedy(p, NO_STOP, 1) for p in PROMPTS]
        assert not any(stopped for _, stopped in sampled_rows(PROMPTS, max_new_tokens=3))

    def test_a_stop_token_at_the_limit_counts_as_stopped(self):
        (ids, _), *_ = sampled_rows(PROMPTS, max_new_tokens=3)
        mask = np.arange(VOCAB) == ids[2]
        if ids[2] not in ids[:2]:
            assert sampled_rows(PROMPTS, mask, max_new_tokens=3)[0] == (ids, True)
        else:
            pytest.fail("the seed repeats a token; choose another prompt")

    @pytest.mark.parametrize(("width", "pad"), [(5, 0), (6, 7), (9, 12)])
    def test_padding_changes_nothing(self, width, pad):
        assert sampled_rows(PROMPTS, width=width, pad=pad) == [numpy_greedy(p, NO_STOP, 8) for p in PROMPTS]

    def test_batch_composition_changes_nothing(self):
        together = sampled_rows(PROMPTS)
        assert sampled_rows(PROMPTS[::-1]) == together[::-1]
        assert [sampled_rows([prompt])[0] for prompt in PROMPTS] == together

    def test_ties_go_to_the_lower_id(self):
        flat = {"last": np.zeros((VOCAB, VOCAB), np.float32), "context": np.zeros((VOCAB, VOCAB), np.float32)}
        flat["last"][:, [4, 9]] = 1.0
        samples = greedy(doubles.DECODE, flat, np.array([[1]]), np.array([1]), NO_STOP, max_new_tokens=2)
        np.testing.assert_array_equal(samples.tokens, [[4, 4]])

    def test_one_trace_serves_all_prompts_of_one_shape(self):
        decode = doubles.DECODE._replace(prefill=chex.assert_max_traces(doubles.prefill, n=1))
        sampled_rows(PROMPTS, decode=decode)
        sampled_rows(PROMPTS[::-1], np.arange(VOCAB) == 2, pad=3, decode=decode)


TOKENIZER = doubles.byte_tokenizer((".", "#"), ("Ċ", "Ċ"), ("Ġ", "T"), ("h", "e"), ("ĠT", "he"))
MARKERS = ("##", "\n")


def stops_of(markers: tuple[str, ...] = MARKERS, tokenizer: Tokenizer = TOKENIZER, **changes) -> Stops:
    settings = {"end_ids": frozenset({tokenizer.eos_id}), "vocab_size": tokenizer.vocab_size}
    return make_stops(tokenizer, markers=markers, **settings | changes)


def ids_of(*texts: str) -> list[int]:
    return [doubles.token(TOKENIZER, text) for text in texts]


cut = functools.partial(cut_response, tokenizer=TOKENIZER, stops=stops_of(), stopped=False)


class TestCutResponse:
    def test_without_a_marker_nothing_is_cut(self):
        response = cut(ids_of(" The", ".", "#"))
        assert (response.text, response.ids, response.finished) == ("The.#", tuple(ids_of(" The", ".", "#")), False)

    def test_a_stop_token_finishes(self):
        assert cut_response(ids_of("a"), TOKENIZER, stops_of(), stopped=True).finished

    def test_end_of_sequence_is_no_part_of_the_response(self):
        response = cut_response([*ids_of("a", "."), TOKENIZER.eos_id], TOKENIZER, stops_of(), stopped=True)
        assert (response.text, response.ids, response.finished) == ("a.", tuple(ids_of("a", ".")), True)

    def test_a_marker_over_several_tokens_is_cut_between_tokens(self):
        response = cut(ids_of(" The", "#", "#", "a"))
        assert (response.text, response.ids, response.finished) == ("The", tuple(ids_of(" The")), True)

    def test_a_cut_inside_a_token_tokenises_what_stays(self):
        # ".#" then "#": the marker begins in the middle of the first token.
        response = cut(ids_of("a", ".#", "#", "b"))
        assert (response.text, response.ids, response.finished) == ("a.", tuple(ids_of("a", ".")), True)

    def test_the_first_of_several_markers_cuts(self):
        response = cut(ids_of("a", "\n", "b", "#", "#"))
        assert (response.text, response.ids) == ("a", tuple(ids_of("a")))

    def test_white_space_before_the_marker_goes(self):
        response = cut(ids_of("a", " ", " ", "\n\n"))
        assert (response.text, response.ids, response.finished) == ("a", tuple(ids_of("a")), True)

    def test_white_space_at_the_end_goes_without_a_marker_too(self):
        response = cut(ids_of("a", ".", " "))
        assert (response.text, response.ids, response.finished) == ("a.", tuple(ids_of("a", ".")), False)

    @pytest.mark.parametrize("texts", [("#", "#", "a"), ("\n",), (" ", "\n\n"), ()])
    def test_a_marker_at_the_very_start_leaves_nothing(self, texts):
        response = cut(ids_of(*texts))
        assert (response.text, response.ids, response.finished) == ("", (), bool(texts))

    def test_characters_of_several_bytes_stay_whole(self):
        ids = TOKENIZER.prompt_ids("é.")
        assert len(ids) == 3  # two bytes and a full stop
        response = cut([*ids, *ids_of("#", "#")])
        assert (response.text, response.ids) == ("é.", tuple(ids))

    def test_every_end_token_ends_and_is_no_part_of_the_response(self):
        stops = stops_of(end_ids=frozenset({TOKENIZER.eos_id, token_of("b")}))
        for end in stops.end_ids:
            response = cut_response([*ids_of("a", "."), end], TOKENIZER, stops, stopped=True)
            assert (response.text, response.ids, response.finished) == ("a.", tuple(ids_of("a", ".")), True)

    def test_a_marker_may_be_a_special_token(self):
        stops = stops_of(("<s>",), end_ids=frozenset())
        assert set(np.flatnonzero(stops.mask)) == {token_of("<s>")}
        response = cut_response([*ids_of("a", "."), token_of("<s>")], TOKENIZER, stops, stopped=True)
        assert (response.text, response.ids, response.finished) == ("a.", tuple(ids_of("a", ".")), True)

    def test_a_special_token_alone_is_no_response(self):
        response = cut([token_of("<s>")])
        assert (response.text, response.ids) == ("", ())

    def test_a_cut_inside_a_token_of_merged_newlines(self):
        # What stays of the token begins with the very newlines that the tokenizer merges with any newline before them.
        tokenizer = doubles.byte_tokenizer(("Ċ", "Ċ"), ("ĊĊ", "x"), ("ĊĊx", "#"))
        stops = stops_of(("#",), tokenizer)
        ids = [doubles.token(tokenizer, text) for text in ("a", "\n\nx#")]
        response = cut_response(ids, tokenizer, stops, stopped=True)
        assert (response.text, response.finished) == ("a\n\nx", True)
        assert tokenizer.decode(response.ids) == response.text

    def test_a_cut_among_many_tokens_costs_few_decodings(self):
        class Counting(Tokenizer):
            spelled = 0

            def spell(self, ids):
                self.spelled += len(ids)
                return super().spell(ids)

        tokenizer, length = Counting(TOKENIZER._backend), 4096
        ids = ids_of("a", ".", "#", "#", *["a"] * length)
        assert cut_response(ids, tokenizer, stops_of(), stopped=False).ids == tuple(ids_of("a", "."))
        assert tokenizer.spelled < 4 * length  # a bisection; token by token it would be length ** 2 / 2

    def test_characters_in_pieces_before_the_cut_keep_the_ids_that_were_sampled(self):
        ids = TOKENIZER.prompt_ids("🙂 é 東京." * 5)
        for count in range(len(ids) + 1):
            response = cut([*ids[:count], *ids_of("#", "#", "a", " ", "b")])
            whole = not TOKENIZER.decode(ids[:count]).endswith("\ufffd")
            assert TOKENIZER.decode(response.ids).strip() == response.text == TOKENIZER.decode(ids[:count]).strip()
            assert response.ids == tuple(ids[: count - (ids[:count][-1:] == ids_of(" "))]) or not whole

    def test_bytes_that_are_no_character_keep_their_ids(self):
        pieces = TOKENIZER.prompt_ids("é")[:1] * 3
        response = cut([*ids_of("a"), *pieces, *ids_of(" ", "#", "#")])
        assert (response.text, response.ids) == ("a\ufffd\ufffd\ufffd", (*ids_of("a"), *pieces))

    def test_the_ids_spell_the_text(self):
        rng = np.random.default_rng(0)
        pieces = ids_of(" The", ".", "#", ".#", " ", "\n\n", "a", "he")
        for _ in range(300):
            ids = rng.choice(pieces, rng.integers(0, 9)).tolist()
            response = cut(ids)
            text = TOKENIZER.decode(ids)
            end = min((text.index(m) for m in MARKERS if m in text), default=len(text))
            assert response.text == text[:end].strip()
            assert TOKENIZER.decode(response.ids).strip() == response.text
            assert response.finished == (end < len(text))


def test_stop_tokens_are_end_of_sequence_and_tokens_with_a_marker_inside():
    vocab = TOKENIZER.vocab_size + 5
    end_ids = frozenset({TOKENIZER.eos_id, vocab - 1})
    mask = stops_of(("\n", ".#"), end_ids=end_ids, vocab_size=vocab).mask
    assert mask.shape == (vocab,)
    assert set(np.flatnonzero(mask).tolist()) == {*end_ids, *ids_of("\n", "\n\n", ".#")}


def test_a_vocabulary_is_decoded_once_for_all_batches():
    class Counting(Tokenizer):
        spelled = 0

        def spell(self, ids):
            self.spelled += 1
            return super().spell(ids)

    tokenizer = Counting(TOKENIZER._backend)
    for markers in (MARKERS, MARKERS, ("x",)):
        mask = stops_of(markers, tokenizer).mask
        assert mask[token_of("x")] == (markers == ("x",))
    assert tokenizer.spelled == tokenizer.vocab_size


def token_of(text: str) -> int:
    return doubles.token(TOKENIZER, text)


class TestSampleResponses:
    vocab = TOKENIZER.vocab_size
    prompts = [TOKENIZER.prompt_ids(text) for text in ("a", "POST: b\n", "The end", "x" * 9)]

    @property
    def params(self):
        params = doubles.table_params(self.vocab, seed=3)
        # Letters, "#" and now and then a newline win over all other tokens.
        likely = ids_of(*"abcdefgh#", " The", ".#")
        params["last"][:, likely] += 400
        params["last"][:, ids_of("\n")] += 399
        return params

    def sample(self, prompts, *, rows: int, round_to: int = 4, max_new_tokens: int = 12):
        return sample_responses(
            doubles.DECODE,
            self.params,
            [Prompt("", tuple(ids)) for ids in prompts],
            TOKENIZER,
            stops=stops_of(),
            max_new_tokens=max_new_tokens,
            rows=rows,
            round_to=round_to,
            sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        )

    def test_equals_a_numpy_loop_and_the_cut(self):
        params, stops = self.params, stops_of()
        expected = []
        for prompt in self.prompts:
            ids: list[int] = []
            while len(ids) < 12 and not (ids and stops.mask[ids[-1]]):
                ids.append(int(np.argmax(doubles.logits_after(params, [*prompt, *ids]))))
            expected.append(cut_response(ids, TOKENIZER, stops, stopped=bool(stops.mask[ids[-1]])))
        assert self.sample(self.prompts, rows=4) == expected
        assert len({response.text for response in expected}) == 4

    def test_rows_and_padding_change_no_text(self):
        together = self.sample(self.prompts, rows=4)
        assert self.sample(self.prompts[::-1], rows=7, round_to=16) == together[::-1]
        assert self.sample(self.prompts[1:2], rows=4) == together[1:2]
