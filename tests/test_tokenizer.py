"""Where a prompt ends and its response begins, for the three kinds of tokenizer that Mistral and Llama models have."""

import json
import re
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

import doubles
from sami_jax.data.tokenizer import Tokenizer, load_tokenizer
from sami_jax.errors import BadDataError
from sami_jax.sampling.stop_text import Stops, cut_response
from tiny_models import KINDS, write_tokenizer

RESPONSES = (
    "The post asks how to make peace.",
    "x",
    "Line one\n\nline two  ends",
    "Grüße 🙂 an 東京",
    ":colons: first",
)
PROMPTS = ("Summary:", "POST: My sister will not talk to me.\n\nSummary", "a", "### Query ü")


@pytest.fixture(scope="module", params=[(kind, bos) for kind in KINDS for bos in (False, True)], ids=str)
def folder(request, tmp_path_factory) -> Path:
    kind, bos = request.param
    path = tmp_path_factory.mktemp(f"{kind}_{bos}")
    write_tokenizer(path, kind, bos=bos)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder)


def adds_bos(folder: Path) -> bool:
    return folder.name.split("0")[0].endswith("True")


def test_bos_is_there_once_where_the_tokenizer_adds_it(folder, tokenizer):
    ids = tokenizer.prompt_ids("Summary:")
    assert [ids[0] == 1, ids.count(1)] == ([True, 1] if adds_bos(folder) else [False, 0])
    assert tokenizer.eos_id == 2
    assert 2 not in ids


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_and_response_decode_to_both_with_a_space(tokenizer, prompt, response):
    ids = tokenizer.response_ids(response, prompt=prompt)
    assert tokenizer.decode(tokenizer.prompt_ids(prompt) + ids) == f"{prompt} {response}"
    assert not {1, 2} & set(ids)


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_equal_to_joint_tokenisation_where_no_merge_crosses(folder, tokenizer, prompt, response):
    # A space begins a word in all three, so that no merge reaches over the boundary.
    joint = RawTokenizer.from_file(str(folder / "tokenizer.json")).encode(f"{prompt} {response}").ids
    assert tokenizer.prompt_ids(prompt) + tokenizer.response_ids(response, prompt=prompt) == joint


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral"])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", None])
def test_a_byte_level_tokenizer_is_one_whatever_class_its_config_names(tmp_path, kind, model_type):
    """transformers before 5.22 makes another one of it for some of these, in silence: setup.py's lower bound."""
    raw, config = write_tokenizer(tmp_path, "byte_level", bos=True), tmp_path / "tokenizer_config.json"
    about = json.loads(config.read_text())
    del about["tokenizer_class"]
    config.write_text(json.dumps(about | ({"tokenizer_class": kind} if kind else {})))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(tmp_path)
    for text in (*PROMPTS, *RESPONSES, " leading", "two  spaces"):
        assert tokenizer.prompt_ids(text) == raw.encode(text).ids


@pytest.mark.parametrize("space", [" ", "  ", "\n", "\t \n"])
def test_white_space_before_the_response_does_not_matter(tokenizer, space):
    expected = tokenizer.response_ids("The post", prompt="Summary:")
    assert tokenizer.response_ids(space + "The post", prompt="Summary:") == expected


@pytest.mark.parametrize("prompt", ["Summary: ", "Summary:\n", "Summary:\n\n", "a\t"])
@pytest.mark.parametrize("response", RESPONSES)
def test_after_a_prompt_that_ends_in_white_space_none_is_added(tokenizer, prompt, response):
    ids = tokenizer.response_ids(response, prompt=prompt)
    assert tokenizer.decode(tokenizer.prompt_ids(prompt) + ids) == prompt + response
    assert ids != tokenizer.response_ids(response, prompt="Summary:")


def test_the_rest_of_the_prompt_does_not_matter(tokenizer):
    assert len({tuple(tokenizer.response_ids("The post", prompt=prompt)) for prompt in PROMPTS}) == 1


def test_the_first_word_is_the_one_that_carries_a_space(folder, tokenizer):
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    space = "Ġ" if folder.name.startswith("byte_level") else "▁"
    spaced, glued = (tokenizer.response_ids("The post", prompt=prompt)[0] for prompt in ("Summary:", "Summary:\n"))
    assert raw.id_to_token(spaced).startswith(space)
    assert not raw.id_to_token(glued).startswith(space)


@pytest.mark.parametrize("text", ["a </s> b", "<s>", "</s></s>", "the <unk> word"])
def test_special_tokens_in_text_become_ordinary_ones(folder, tokenizer, text):
    ids = tokenizer.prompt_ids(text)
    ordinary = ids[1:] if adds_bos(folder) else ids
    response = tokenizer.response_ids(text, prompt="Summary:")
    assert not {0, 1, 2} & {*ordinary, *response}
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.prompt_ids("Summary:") + response) == f"Summary: {text}"


@pytest.mark.parametrize("response", ["", " ", "\n\t "])
@pytest.mark.parametrize("prompt", ["Summary:", "Summary:\n"])
def test_an_empty_response_has_no_tokens(tokenizer, prompt, response):
    assert tokenizer.response_ids(response, prompt=prompt) == []


def test_decode_leaves_special_tokens_out_and_spaces_as_they_are(tokenizer):
    ids = tokenizer.response_ids("one , two .", prompt="Summary:")
    assert tokenizer.decode([*ids, 2]).strip() == "one , two ."
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("response", RESPONSES[:4])
def test_a_cut_response_keeps_the_ids_that_were_sampled(tokenizer, response):
    ids = tokenizer.response_ids(response, prompt="Summary:")
    stops = Stops(frozenset({2}), ("Human:", "###"))
    whole = cut_response([*ids, 2], tokenizer, stops)
    assert (whole.text, whole.ids, whole.finished) == (response, tuple(ids), True)
    # The marker stands behind white space, so that the cut falls between tokens.
    longer = tokenizer.response_ids(f"{response} ### and more", prompt="Summary:")
    cut = cut_response(longer, tokenizer, stops)
    assert (cut.text, cut.ids, cut.finished) == (response, tuple(ids), True)
    unfinished = cut_response(ids, tokenizer, stops)
    assert (unfinished.text, unfinished.ids, unfinished.finished) == (response, tuple(ids), False)


def test_a_tokenizer_that_merges_over_the_boundary_is_refused():
    class Backend:
        """The one call that response_ids makes, on a BPE that splits nowhere and knows ': ' as one token."""

        def __init__(self):
            self.raw = RawTokenizer(models.BPE(vocab={":": 0, "Ġ": 1, "x": 2, ":Ġ": 3}, merges=[(":", "Ġ")]))
            self.raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            self.raw.decoder = decoders.ByteLevel()

        def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> dict:
            return {"input_ids": self.raw.encode(text, add_special_tokens=add_special_tokens).ids}

    with pytest.raises(BadDataError, match="merges ':' with what follows it.*store response_ids"):
        Tokenizer(Backend()).response_ids("x", prompt="Summary:")


def with_template(folder: Path, kind: str, single: str) -> Path:
    """A tokenizer folder whose template is `single`."""
    raw = write_tokenizer(folder, kind, bos=False)
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    raw.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "leading"), [("<s> $A </s>", (1,)), ("$A </s>", ()), ("<s> <s> $A", (1, 1)), ("$A", ())]
)
def test_a_prompt_has_what_goes_in_front_and_never_what_ends_a_text(tmp_path, kind, template, leading):
    tokenizer = load_tokenizer(with_template(tmp_path, kind, template))
    plain = load_tokenizer(with_template(tmp_path / "plain", kind, "$A"))
    assert tokenizer.leading_ids == leading
    for prompt in PROMPTS:
        assert tokenizer.prompt_ids(prompt) == [*leading, *plain.prompt_ids(prompt)]
        assert tokenizer.response_ids("The post", prompt=prompt) == plain.response_ids("The post", prompt=prompt)


@pytest.mark.parametrize("template", ["$A </s> $A", "<s> $A $A </s>"])
def test_a_template_that_cannot_be_taken_apart_is_refused(tmp_path, template):
    folder = with_template(tmp_path, "byte_level", template)
    with pytest.raises(BadDataError, match=f"{tmp_path}: the tokenizer's template .* cannot be taken apart.*mend"):
        load_tokenizer(folder)


def test_the_documented_way_to_begin_prompts_with_control_tokens(tmp_path, monkeypatch):
    control = ["<|begin_of_text|>", "<|start_header_id|>"]
    raw = write_tokenizer(tmp_path / "model", "byte_level", bos=True)
    raw.add_special_tokens(control)
    raw.save(str(tmp_path / "model" / "tokenizer.json"))
    written = load_tokenizer(tmp_path / "model").prompt_ids("".join(control) + "Be kind.")
    document = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(code.replace("\n  ", "\n").strip()), {})
    ids = [raw.token_to_id(name) for name in control]
    assert not set(ids) & set(written)  # as text they are none
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.leading_ids == tuple(ids) and tokenizer.decode(tokenizer.prompt_ids("Be kind.")) == "Be kind."


class TestTheAuthorsBoundary:
    @pytest.mark.parametrize("response", RESPONSES)
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_is_one_text_without_a_space(self, folder, tokenizer, prompt, response):
        ids = tokenizer.response_ids(response, prompt=prompt, boundary="authors")
        assert tokenizer.decode(tokenizer.prompt_ids(prompt) + ids) == prompt + response
        joint = RawTokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt + response).ids
        head = tokenizer.prompt_ids(prompt)
        assert joint[: len(head)] != head or ids == joint[len(head) :]

    def test_is_another_one(self, tokenizer):
        exact, authors = (
            tokenizer.response_ids("The post", prompt="Summary:", boundary=boundary)
            for boundary in ("exact", "authors")
        )
        assert exact != authors

    def test_a_merge_over_it_is_undone(self):
        tokenizer = doubles.byte_tokenizer((":", "x"), ("x", "y"))
        assert tokenizer.spell(tokenizer.prompt_ids("a:xy")[1:2]) == ":x"
        ids = tokenizer.response_ids("xy", prompt="a:", boundary="authors")
        assert [tokenizer.spell([i]) for i in ids] == ["xy"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(BadDataError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadDataError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)
