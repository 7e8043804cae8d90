"""The decoder against transformers on torch, rung by rung: norm, rope, attention, MLP, layer, logits, folders."""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import doubles
from ladder import rungs
from sami_jax.config.run import from_dict
from sami_jax.data.rendering import plain_prompt
from sami_jax.huggingface.folder import read_config, save_finetuned
from sami_jax.huggingface.opened import load_model
from sami_jax.losses import sami_loss
from sami_jax.model.decoder import make_model
from sami_jax.model.layers import rope_frequencies, rotate
from sami_jax.model.moe import route
from sami_jax.responding import respond
from sami_jax.scoring.head import logits_of
from sami_jax.scoring.matrices import all_logits, causal_rows, contrastive_logps
from sami_jax.types import Array, Params
from tiny_models import load_float32, write_tokenizer
from torch_models import FAMILIES, routed, seen, torch_model, turned

sys.path.insert(0, str(Path(__file__).parents[1] / "goldens"))

import make_families

# Both sides are float32, which rounds at 6e-8 relative. Hidden states and logits are of size 1 to 5 here, and two
# layers of sums in another order leave 4e-6.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
assert_logits_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)

TOKENS = np.random.default_rng(0).integers(0, 64, (3, 17))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    torch_model(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder) -> torch.nn.Module:
    return loaded(folder)


def loaded(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(folder: Path) -> np.ndarray:
    config = read_config(folder)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    return np.asarray(all_logits(make_model(config).rows, load_float32(folder, config), tokens))


@pytest.mark.parametrize("family", ["mistral", "llama3"])
def test_rope(family, tmp_path):
    model = torch_model(family)
    model.config.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 9, 3, 8)).astype(np.float32), rng.integers(0, 128, (2, 9))
    frequencies = rope_frequencies(8, theta=config.rope_theta, scaling=config.rope_scaling)
    actual = rotate(jnp.asarray(x), jnp.asarray(positions, jnp.int32), frequencies)
    # Angles reach 127 radians, where float32 is exact to 4e-6 (half a unit in the last place).
    np.testing.assert_allclose(actual, turned(model, x, positions), rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["mixtral", "mixtral_window"])
def test_experts_are_chosen_alike(family, tmp_path):
    model = torch_model(family)
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    router = load_float32(tmp_path, config)["blocks"]["mlp"]["router"][0]
    x = np.random.default_rng(0).normal(size=(3, 200, 24)).astype(np.float32)
    ours, our_shares = route(jnp.asarray(x), router, k=config.experts_per_token)
    chosen, shares = routed(model, 0, x)
    np.testing.assert_array_equal(ours.reshape(600, -1), chosen)
    assert_close(our_shares.reshape(600, -1), shares)


def test_ladder(folder, theirs):
    config = read_config(folder)
    params = jax.tree.map(jnp.asarray, load_float32(folder, config))
    ours = rungs(config, params, tokens=TOKENS.shape[1])
    for name, (given, expected) in seen(theirs, ours, TOKENS).items():
        assert_close(ours[name](jnp.asarray(given)), expected, err_msg=name)


def test_logits(folder, theirs):
    ours, expected = our_logits(folder), torch_logits(theirs)
    print(f"logits up to {np.abs(expected).max():.1f}; largest difference {np.abs(ours - expected).max():.2e}")
    assert_logits_close(ours, expected)


@pytest.mark.parametrize("family", ["mistral_full", "llama3"])
def test_logits_at_8000_positions(family, tmp_path):
    """Where the last bit of a rotary frequency, times the position, is a difference of its own."""
    rope = {"rope_theta": 10000.0}
    if family == "llama3":
        rope |= FAMILIES[family][1]["rope_parameters"] | {
            "rope_theta": 500000.0,
            "original_max_position_embeddings": 512,
        }
    one = {
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    }
    model = torch_model(family, rope_parameters={"rope_type": "default"} | rope, **one)
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 8000))
    with torch.no_grad():
        expected = model(torch.tensor(tokens), logits_to_keep=1000).logits.numpy()
    params = jax.tree.map(jnp.asarray, load_float32(tmp_path, config))
    model = make_model(config).rows
    hidden = jax.jit(model.hidden)(params, causal_rows(jnp.asarray(tokens, jnp.int32)))
    logits = logits_of(hidden[:, 7000:], model.head(jax.tree.map(jnp.asarray, params)))
    print(f"{family}: largest difference {np.abs(logits - expected).max():.2e}")
    # Angles of up to 8000 radians are rounded by 2.4e-4, on both sides alike; sums in another order leave 6e-6.
    # Frequencies rounded from float64 are off by 3e-5 and 1e-4.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text(family, tmp_path):
    """Prompts of several lengths together, two end tokens, the second of which torch comes to."""
    size = write_tokenizer(tmp_path, "byte_level", bos=True).get_vocab_size()
    model = torch_model(family, vocab_size=size, max_position_embeddings=128)
    model.save_pretrained(tmp_path)
    prompts = ["The post", "Summaries should be concise. Summary:", "x"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def generated(prompt: str) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        return model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)[0, ids.shape[1] :].tolist()

    model.generation_config.eos_token_id = None
    free = [generated(prompt) for prompt in prompts]
    end = free[0][5]
    model.generation_config.eos_token_id = [2, end]
    model.save_pretrained(tmp_path)
    config = from_dict({"sampling": {"max_new_tokens": 16, "stop": []}})
    loaded = load_model(tmp_path, config.mesh, config.compute_dtype)
    responses = respond(loaded, [plain_prompt(loaded.tokenizer, text) for text in prompts], config.sampling)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = generated(prompt)
        if ids[-1] in (2, end):
            ids.pop()
        assert response.finished == (len(ids) < 16)
        assert response.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert list(response.ids) == ids[: len(response.ids)]
        assert tokenizer.decode(ids[len(response.ids) :]).isspace() or len(response.ids) == len(ids)
    assert len(responses[0].ids) <= 5 and len(set(free[1])) > 2


def test_gradients(folder, tmp_path):
    """Of the loss, leaf by leaf, for ragged pairs in one padded batch."""
    queries = make_families.make_ids(np.random.default_rng(5))[:3]
    model = loaded(folder)
    make_families.sami_loss(model, queries).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients[name])
    model.save_pretrained(tmp_path)  # to be read back under our names, in our shapes
    config = read_config(folder)
    expected, params = load_float32(tmp_path, config), load_float32(folder, config)
    pairs = [doubles.pair(query["prompts"], query["responses"]) for query in queries]
    [batch] = doubles.packing(pairs, rows=3).micro_batches(0)
    model = make_model(config).rows

    def loss(params: Params) -> Array:
        return jnp.mean(jax.vmap(sami_loss)(contrastive_logps(model, params, batch, normalize="mean")).loss)

    compiled = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": "0"})
    ours = compiled(jax.tree.map(jnp.asarray, params))
    for (path, mine), torchs in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        largest = float(np.abs(torchs).max())
        assert largest > 1e-4
        # Sums of some hundred float32 terms, in another order: of the size of the leaf's largest entry.
        np.testing.assert_allclose(mine, torchs, rtol=1e-4, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))


def test_the_window_is_felt():
    """That the two agree on a windowed model says something only if the window changes the logits."""
    windowed, full = torch_model("mistral"), torch_model("mistral", sliding_window=None)
    difference = np.abs(torch_logits(windowed) - torch_logits(full)).max(axis=(0, 2))
    assert (difference[:9] < 1e-4).all() and (difference[9:] > 0.1).all()


def test_the_scaling_is_felt():
    plain = {"rope_type": "default", "rope_theta": 100.0}
    scaled, unscaled = torch_model("llama3"), torch_model("llama3", rope_parameters=plain)
    assert np.abs(torch_logits(scaled) - torch_logits(unscaled)).max() > 0.1


def test_our_folder_in_transformers(folder, theirs, tmp_path):
    config = read_config(folder)
    out = tmp_path / "tuned"
    save_finetuned(out, load_float32(folder, config), config, dtype="float32", source=folder, card="# A model\n")
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (
            after[name].dtype,
            after[name].shape,
            after[name].tobytes(),
        )
    again = loaded(out)
    assert again.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
    np.testing.assert_array_equal(torch_logits(again), torch_logits(theirs))
    assert_logits_close(our_logits(out), torch_logits(theirs))


def test_a_folder_with_two_models_is_read_as_torch_reads_it(tmp_path):
    """Older shards with their index, and beside them one newer file."""
    torch_model("llama2", seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    torch_model("llama2", seed=2).save_pretrained(tmp_path / "newer")
    (tmp_path / "newer" / "model.safetensors").rename(tmp_path / "model.safetensors")
    ours, expected = our_logits(tmp_path), torch_logits(loaded(tmp_path))
    assert_logits_close(ours, expected)
    (tmp_path / "model.safetensors").unlink()
    assert np.abs(our_logits(tmp_path) - expected).max() > 0.1


def test_an_export_ends_where_its_source_does(tmp_path):
    """config.json alone names the end token: an empty generation_config.json beside it would hide it from torch."""
    write_tokenizer(tmp_path, "byte_level", bos=True)
    prompt = torch.tensor([[1, 40, 50]])

    def generated(folder: Path) -> list[int]:
        return loaded(folder).generate(prompt, do_sample=False, max_new_tokens=24, pad_token_id=0)[0, 3:].tolist()

    torch_model("llama2", eos_token_id=None).save_pretrained(tmp_path)
    end = generated(tmp_path)[4]
    torch_model("llama2", eos_token_id=end).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    before, config = generated(tmp_path), read_config(tmp_path)
    params = load_float32(tmp_path, config)
    save_finetuned(tmp_path / "out", params, config, dtype="float32", source=tmp_path, card="")
    assert generated(tmp_path / "out") == before and len(before) <= 5


def test_folders_of_bfloat16_shards_and_old_configs(folder, theirs, tmp_path):
    """What the Hub holds: bfloat16, several shards with an index, and rope settings where transformers 4 put them."""
    loaded(folder).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    path.write_text(json.dumps(config))
    expected = torch_logits(loaded(tmp_path))
    assert np.abs(expected - torch_logits(theirs)).max() > 1e-3  # the weights were rounded
    assert_logits_close(our_logits(tmp_path), expected)
