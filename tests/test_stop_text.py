"""Where a response ends: the cut at end tokens and stop markers, and the quick look that finds what will be cut."""

import functools

import numpy as np
import pytest

import doubles
from sami_jax.data.tokenizer import Tokenizer
from sami_jax.sampling.stop_text import Stops, cut_response, has_stopped, settled_text

TOKENIZER = doubles.byte_tokenizer((".", "#"), ("Ċ", "Ċ"), ("Ġ", "T"), ("h", "e"), ("ĠT", "he"))
MARKERS = ("##", "\n")


def stops_of(
    markers: tuple[str, ...] = MARKERS, tokenizer: Tokenizer = TOKENIZER, *, end_ids: frozenset[int] | None = None
) -> Stops:
    return Stops(frozenset({tokenizer.eos_id}) if end_ids is None else end_ids, markers)


def ids_of(*texts: str) -> list[int]:
    return [doubles.token(TOKENIZER, text) for text in texts]


cut = functools.partial(cut_response, tokenizer=TOKENIZER, stops=stops_of())


class TestCutResponse:
    def test_without_a_marker_nothing_is_cut(self):
        response = cut(ids_of(" The", ".", "#"))
        assert (response.text, response.ids, response.finished) == ("The.#", tuple(ids_of(" The", ".", "#")), False)

    def test_what_stands_behind_an_end_token_does_not_matter(self):
        response = cut_response([*ids_of("a"), TOKENIZER.eos_id, *ids_of("b", "#", "#")], TOKENIZER, stops_of())
        assert (response.text, response.ids, response.finished) == ("a", tuple(ids_of("a")), True)

    def test_end_of_sequence_is_no_part_of_the_response(self):
        response = cut_response([*ids_of("a", "."), TOKENIZER.eos_id], TOKENIZER, stops_of())
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
            response = cut_response([*ids_of("a", "."), end], TOKENIZER, stops)
            assert (response.text, response.ids, response.finished) == ("a.", tuple(ids_of("a", ".")), True)

    def test_a_marker_may_be_a_special_token(self):
        stops = stops_of(("<s>",), end_ids=frozenset())
        response = cut_response([*ids_of("a", "."), token_of("<s>")], TOKENIZER, stops)
        assert (response.text, response.ids, response.finished) == ("a.", tuple(ids_of("a", ".")), True)

    def test_a_special_token_alone_is_no_response(self):
        response = cut([token_of("<s>")])
        assert (response.text, response.ids) == ("", ())

    def test_a_cut_inside_a_token_of_merged_newlines(self):
        # What stays of the token begins with the very newlines that the tokenizer merges with any newline before them.
        tokenizer = doubles.byte_tokenizer(("Ċ", "Ċ"), ("ĊĊ", "x"), ("ĊĊx", "#"))
        stops = stops_of(("#",), tokenizer)
        ids = [doubles.token(tokenizer, text) for text in ("a", "\n\nx#")]
        response = cut_response(ids, tokenizer, stops)
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
        assert cut_response(ids, tokenizer, stops_of()).ids == tuple(ids_of("a", "."))
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


def token_of(text: str) -> int:
    return doubles.token(TOKENIZER, text)


class TestHasStopped:
    """It sees new tokens with a few before them, and says what the cut of the whole finds."""

    @pytest.mark.parametrize("new", [1, 2, 3, 7])
    def test_it_says_what_the_cut_says_whatever_is_new(self, new):
        rng = np.random.default_rng(new)
        tokenizer = doubles.byte_tokenizer((".", "#"), ("Ċ", "Ċ"), ("Ġ", "T"), ("h", "e"), ("ĠT", "he"))
        stops = Stops(frozenset({tokenizer.eos_id}), ("##", "é#", "The.", "<s>", "\n\n"))
        pieces = [doubles.token(tokenizer, text) for text in (" The", "#", ".#", " ", "\n", "a", "he", "T", ".", "<s>")]
        pieces += [*tokenizer.prompt_ids("é"), *tokenizer.prompt_ids("🙂"), tokenizer.eos_id]
        likely = np.array([3.0] * (len(pieces) - 1) + [1.0])
        places = set()
        for _ in range(200):
            ids = rng.choice(pieces, 24, p=likely / likely.sum()).tolist()
            stopped = None
            for count in range(new, len(ids) + 1, new):
                said = has_stopped(ids[:count], tokenizer, stops, new=new)
                assert said == cut_response(ids[:count], tokenizer, stops).finished
                if said:
                    stopped = count
                    # What comes later changes nothing of what was cut.
                    assert cut_response(ids[:count], tokenizer, stops) == cut_response(ids, tokenizer, stops)
                    break
            places.add(stopped)
        assert {new, None} & places and len(places) > 2

    def test_a_marker_that_begins_in_the_words_that_were_given_is_none(self):
        prefix = ids_of("#")
        assert not has_stopped(ids_of("#", "a"), TOKENIZER, stops_of(), new=2, prefix=prefix)
        assert has_stopped(ids_of("#", "#"), TOKENIZER, stops_of(), new=2, prefix=prefix)

    def test_only_the_last_tokens_are_turned_to_text(self):
        class Counting(Tokenizer):
            spelled = 0

            def spell(self, ids):
                self.spelled += len(ids)
                return super().spell(ids)

        tokenizer = Counting(TOKENIZER._backend)
        assert not has_stopped(ids_of(*"ab" * 500), tokenizer, stops_of(), new=16)
        assert tokenizer.spelled <= 16 + 4 * 2


def test_a_settled_text_is_what_every_later_response_begins_with():
    rng = np.random.default_rng(1)
    stops = stops_of(("##", "é#", "The.", "\n\n"))
    pieces = [*ids_of(" The", "#", ".#", " ", "\n", "a", "he", "T", "."), *TOKENIZER.prompt_ids("é🙂")]
    longest = 0
    for _ in range(200):
        ids = rng.choice(pieces, 20).tolist()
        for count in range(len(ids)):
            if has_stopped(ids[:count], TOKENIZER, stops, new=count):
                break
            settled = settled_text(ids[:count], TOKENIZER, stops)
            assert cut_response(ids, TOKENIZER, stops).text.startswith(settled)
            longest = max(longest, len(settled))
    assert longest > 8
