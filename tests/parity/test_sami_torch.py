"""SAMI against torch, end to end: the matrices of a pairs file, and four optimizer steps on a model folder."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sami_jax.config.run import RunConfig, from_dict
from sami_jax.data.tokenizer import load_tokenizer
from sami_jax.run.single_stages import score_file, train_folder
from sami_jax.training import query_indices
from tiny_models import write_tokenizer
from torch_models import torch_model

STEPS, QUERIES_PER_STEP, N_PAIRS, SEED = 4, 4, 6, 3  # the second step crosses from one epoch into the next
OPTIMIZERS = {
    "adamw": (1e-3, lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr)),
    "rmsprop": (1e-3, lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr)),
}
POSTS = (
    "My sister will not talk to me",
    "How do I bake bread?",
    "A trip to the sea",
    "x",
    "The cat is ill",
    "Rent is due",
)
ANSWERS = (
    "The post asks how to make peace.",
    "Bread.",
    "The post is about a trip, at length and with </s> in it.",
    "Yes.",
)


class Prepared(NamedTuple):
    folder: Path
    pairs: Path
    texts: list[list[dict[str, Any]]]  # [query][constitution]


KINDS = {"mistral": "mistral", "llama3": "byte_level", "mixtral": "mistral"}  # of tokenizer


@pytest.fixture(scope="module", params=KINDS)
def prepared(request, tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp(request.param)
    tokens = write_tokenizer(folder, KINDS[request.param], bos=True).get_vocab_size()
    shape = {"vocab_size": tokens, "max_position_embeddings": 256, "initializer_range": 0.15}
    if request.param == "mistral":
        # Shorter than every prompt, yet long enough that two layers see the constitution. At 16 they hardly do: the
        # rows of a matrix agree to 1e-4, the gradient is a difference of nearly equal terms, and rounding decides:
        # after four steps of RMSprop torch's float32 agrees with its own float64 in 97.7 % of the weights; at 24 in
        # 99.96 %.
        shape["sliding_window"] = 24
    torch_model(request.param, **shape).save_pretrained(folder)
    texts = []
    for query in range(N_PAIRS):
        signs = ("concise", "comprehensive")
        texts.append(
            [
                {
                    "prompt": f"Summaries should be {sign}.\nPOST: {POSTS[query]}\nSummary:",
                    "response": ANSWERS[(query + i) % len(ANSWERS)],
                    "example_id": f"q{query}",
                }
                for i, sign in enumerate(signs)
            ]
        )
    path = folder.parent / f"{request.param}_pairs.json"
    path.write_text(json.dumps({str(number): query for number, query in enumerate(texts)}))
    return Prepared(folder, path, texts)


def run_config(**train: Any) -> RunConfig:
    settings = {
        "steps": (STEPS,),
        "queries_per_step": QUERIES_PER_STEP,
        "rows_per_device": 2 * QUERIES_PER_STEP,
        "passes": STEPS * QUERIES_PER_STEP / N_PAIRS,
    }
    return from_dict({"seed": SEED, "iterations": 1, "train": settings | train})


def load_torch(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def ids_of(prepared: Prepared) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Prompt and response ids of each query, by transformers alone: the response's are what joint tokenisation adds."""
    backend = AutoTokenizer.from_pretrained(prepared.folder)
    encode = functools.partial(backend, split_special_tokens=True)
    data = []
    for query in prepared.texts:
        prompts = [encode(entry["prompt"])["input_ids"] for entry in query]
        wholes = [encode(f"{entry['prompt']} {entry['response']}")["input_ids"] for entry in query]
        assert all(whole[: len(prompt)] == prompt for whole, prompt in zip(wholes, prompts, strict=True))
        data.append((prompts, [whole[len(prompt) :] for whole, prompt in zip(wholes, prompts, strict=True)]))
    return data


def torch_matrix(model: torch.nn.Module, prompts: list, responses: list, *, normalize: str) -> torch.Tensor:
    """[C, R]: one sequence at a time, unpadded, so that no mask can be wrong."""
    rows = []
    for prompt in prompts:
        row = []
        for response in responses:
            ids = torch.tensor([prompt + response])
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            row.append(-F.cross_entropy(logits, ids[0, len(prompt) :], reduction=normalize))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def torch_loss(matrix: torch.Tensor) -> torch.Tensor:
    positives = torch.arange(len(matrix))
    return (F.cross_entropy(matrix, positives) + F.cross_entropy(matrix.T, positives)) / 2


class Trained(NamedTuple):
    losses: list[float]
    weights: dict[str, np.ndarray]


def torch_training(prepared: Prepared, out: Path, *, optimizer: str, normalize: str) -> Trained:
    model, data = load_torch(prepared.folder), ids_of(prepared)
    rate, make = OPTIMIZERS[optimizer]
    update = make(model.parameters(), rate)
    losses = []
    for step in range(STEPS):
        order = query_indices(N_PAIRS, step, seed=SEED, iteration=1, queries_per_step=QUERIES_PER_STEP)
        loss = torch.stack([torch_loss(torch_matrix(model, *data[i], normalize=normalize)) for i in order]).mean()
        update.zero_grad()
        loss.backward()
        update.step()
        losses.append(loss.item())
    model.save_pretrained(out)
    return Trained(losses, load_file(out / "model.safetensors"))


def our_training(prepared: Prepared, out: Path, *, optimizer: str, **train: Any) -> Trained:
    config = run_config(optimizer=optimizer, learning_rate=OPTIMIZERS[optimizer][0], **train)
    train_folder(config, model=str(prepared.folder), pairs=prepared.pairs, out=out)
    lines = (out.with_name(out.name + ".training") / "metrics.jsonl").read_text().splitlines()
    return Trained([json.loads(line)["loss"] for line in lines], load_file(out / "model.safetensors"))


def share_of_updates_that_agree(before: dict, ours: dict, theirs: dict) -> tuple[float, float]:
    """The share of weights with |d_ours - d_theirs| <= 1e-6 + 0.01 |d_theirs|, and the largest difference.

    Not all of them: a gradient as small as its rounding is still scaled up to the learning rate by both optimizers.
    """
    assert ours.keys() == theirs.keys() == before.keys()
    differences, allowed = [], []
    for name, start in before.items():
        ours_moved, theirs_moved = (weights[name].astype(np.float64) - start for weights in (ours, theirs))
        differences.append(np.abs(ours_moved - theirs_moved).ravel())
        allowed.append(1e-6 + 0.01 * np.abs(theirs_moved).ravel())
    difference = np.concatenate(differences)
    return float(np.mean(difference <= np.concatenate(allowed))), float(difference.max())


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_the_matrix_of_a_pairs_file(prepared, normalize):
    lines = score_file(run_config(normalize=normalize), model=str(prepared.folder), pairs=prepared.pairs, out=None)
    model = load_torch(prepared.folder)
    with torch.no_grad():
        expected = [torch_matrix(model, *ids, normalize=normalize) for ids in ids_of(prepared)]
    # Nats per token to 1e-5; a sum of n tokens of up to -8 nats each is rounded in its own size, at 6e-8 relative.
    tolerance = {"rtol": 0, "atol": 1e-5} if normalize == "mean" else {"rtol": 1e-6, "atol": 1e-5}
    matrices = np.array([line["logps"] for line in lines])
    print(f"{normalize}: largest difference {np.abs(matrices - np.array(expected)).max():.2e}")
    np.testing.assert_allclose(matrices, np.array(expected), **tolerance)
    assert [line["example_id"] for line in lines] == [f"q{i}" for i in range(N_PAIRS)]
    np.testing.assert_allclose([line["loss"] for line in lines], [torch_loss(m) for m in expected], rtol=0, atol=2e-5)
    # A transposed matrix would not pass.
    assert np.abs(matrices - matrices.transpose(0, 2, 1)).max() > 1e-2


def test_the_two_tokenise_alike(prepared):
    tokenizer = load_tokenizer(prepared.folder)
    for query, (prompts, responses) in zip(prepared.texts, ids_of(prepared), strict=True):
        assert [tokenizer.prompt_ids(entry["prompt"]) for entry in query] == prompts
        assert [tokenizer.response_ids(entry["response"], prompt=entry["prompt"]) for entry in query] == responses
        assert not {2} & {token for ids in (*prompts, *responses) for token in ids}


@pytest.mark.parametrize("optimizer, normalize", [("adamw", "mean"), ("rmsprop", "mean"), ("adamw", "sum")])
def test_four_steps(prepared, tmp_path, optimizer, normalize):
    theirs = torch_training(prepared, tmp_path / "theirs", optimizer=optimizer, normalize=normalize)
    ours = our_training(prepared, tmp_path / "out", optimizer=optimizer, normalize=normalize)
    before = load_file(prepared.folder / "model.safetensors")
    agree, largest = share_of_updates_that_agree(before, ours.weights, theirs.weights)
    print(f"{optimizer} {normalize}: losses {ours.losses}, differ by {np.subtract(ours.losses, theirs.losses)}")
    print(f"updates that agree: {agree:.5%}; largest difference {largest:.2e}")
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=0, atol=1e-4)
    assert agree >= 0.999
    # The checks can fail: no update at all, and losses that stand still.
    assert share_of_updates_that_agree(before, before, theirs.weights)[0] < 0.5
    assert np.ptp(theirs.losses) > 1e-2


def test_accumulated_gradients_are_those_of_the_whole_batch(prepared, tmp_path):
    whole = our_training(prepared, tmp_path / "whole", optimizer="adamw")
    parts = our_training(prepared, tmp_path / "parts", optimizer="adamw", rows_per_device=2)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=0, atol=1e-5)
    before = load_file(prepared.folder / "model.safetensors")
    assert share_of_updates_that_agree(before, parts.weights, whole.weights)[0] >= 0.999
