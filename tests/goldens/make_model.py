"""Writes model.npz: a random Mistral and what torch says about it. Run by hand, with torch, from anywhere.

python tests/goldens/make_model.py
"""

import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
import transformers

C, N_QUERIES, QUERIES_PER_STEP, STEPS = 2, 5, 3, 4
CONFIG = transformers.MistralConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    sliding_window=9,  # shorter than prompt and response
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    rms_norm_eps=1e-5,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,  # and no pad_token_id: torch would freeze that token's embedding
    attn_implementation="eager",
)


def make_model() -> torch.nn.Module:
    torch.manual_seed(404)
    model = transformers.MistralForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_ids(rng: np.random.Generator) -> list[dict[str, list[list[int]]]]:
    """Ragged prompts and responses. Some hold token 2, the pad and end of sequence: it is a token like any other."""

    def ids(low: int, high: int) -> list[int]:
        return [int(i) for i in rng.integers(2, 64, rng.integers(low, high))]

    queries = [
        {"prompts": [[1, *ids(3, 12)] for _ in range(C)], "responses": [ids(1, 8) for _ in range(C)]}
        for _ in range(N_QUERIES)
    ]
    queries[0]["responses"][0][:2] = [2, 5]
    queries[1]["responses"][1].append(2)
    return queries


def matrix(model: torch.nn.Module, query: dict[str, list[list[int]]], normalize: str) -> torch.Tensor:
    """[C, R] log-probs, one unpadded sequence at a time."""

    def cell(prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return -F.cross_entropy(logits, torch.tensor(response), reduction=normalize)

    return torch.stack([torch.stack([cell(p, r) for r in query["responses"]]) for p in query["prompts"]])


def train(queries: list, order: np.ndarray, optimizer: type, **settings: float) -> list[float]:
    """The loss of every step, before its update."""
    model, positives, losses = make_model(), torch.arange(C), []
    update = optimizer(model.parameters(), **settings)
    for indices in order:
        matrices = [matrix(model, queries[i], "mean") for i in indices]
        two_sided = [(F.cross_entropy(m, positives) + F.cross_entropy(m.T, positives)) / 2 for m in matrices]
        loss = torch.stack(two_sided).mean()
        update.zero_grad()
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    rng = np.random.default_rng(404)
    model, queries = make_model(), make_ids(rng)
    tokens = rng.integers(0, 64, (2, 20))
    order = np.stack([rng.permutation(N_QUERIES)[:QUERIES_PER_STEP] for _ in range(STEPS)])
    with torch.no_grad():
        goldens = {
            "about": f"tests/goldens/make_model.py, torch {torch.__version__}, transformers {transformers.__version__}",
            "config": json.dumps(CONFIG.to_dict(), default=str),
            "queries": json.dumps(queries),
            "tokens": tokens,
            "logits": model(torch.tensor(tokens)).logits.numpy(),
            "mean_logps": np.stack([matrix(model, query, "mean").numpy() for query in queries]),
            "sum_logps": np.stack([matrix(model, query, "sum").numpy() for query in queries]),
            "order": order,
            **{f"weights/{name}": tensor.numpy() for name, tensor in model.state_dict().items()},
        }
    goldens["adamw_losses"] = train(queries, order, torch.optim.AdamW, lr=1e-3)
    goldens["rmsprop_losses"] = train(queries, order, torch.optim.RMSprop, lr=1e-4)
    np.savez_compressed(pathlib.Path(__file__).with_name("model.npz"), **goldens)
