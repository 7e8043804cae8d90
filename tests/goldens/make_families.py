"""Writes one .npz per family: a random model and what torch says about it. Needs torch.

python tests/goldens/make_families.py
"""

import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from torch_models import routed, seen, torch_model, turned  # noqa: E402

MADE = ("mistral", "llama3", "mixtral")
C, N_QUERIES, QUERIES_PER_STEP, STEPS, GREEDY = 2, 5, 3, 4, 8


def script_hash() -> str:
    """SHA-256 of what decides the goldens, torch and transformers aside."""
    sources = [HERE / "make_families.py", HERE.parent / "torch_models.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


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


def sami_loss(model: torch.nn.Module, queries: Sequence[dict]) -> torch.Tensor:
    """The mean over queries of the two-sided loss."""
    matrices, positives = [matrix(model, query, "mean") for query in queries], torch.arange(C)
    return torch.stack([(F.cross_entropy(m, positives) + F.cross_entropy(m.T, positives)) / 2 for m in matrices]).mean()


def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """The likeliest next token, GREEDY times."""
    ids = list(prompt)
    for _ in range(GREEDY):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def train(family: str, batches: Sequence[Sequence[dict]], optimizer: type, **settings: float) -> list[float]:
    """The loss of every step, before its update."""
    model, losses = torch_model(family), []
    update = optimizer(model.parameters(), **settings)
    for queries in batches:
        loss = sami_loss(model, queries)
        update.zero_grad()
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses


def named(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """As a folder's safetensors hold them: a tied head is left out."""
    seen: dict[int, str] = {}
    return {
        name: tensor.detach().numpy().copy()
        for name, tensor in tensors.items()
        if seen.setdefault(tensor.data_ptr(), name) == name
    }


def ladder(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Input and output of each rung below the logits; of the rotary embedding, with positions up to 127."""
    parts = ("", ".input_layernorm", ".self_attn", ".post_attention_layernorm", ".mlp")
    names = [f"model.layers.{layer}{part}" for layer in range(2) for part in parts]
    found = {}
    for name, (given, out) in seen(model, [*names, "model.norm"], rng.integers(0, 64, (1, 20))).items():
        found |= {f"in/{name}": given, f"out/{name}": out}
    x, positions = rng.normal(size=(2, 5, 3, 8)).astype(np.float32), rng.integers(0, 128, (2, 5))
    found |= {"rope/x": x, "rope/positions": positions, "rope/turned": turned(model, x, positions)}
    if hasattr(model.config, "num_local_experts"):
        x = rng.normal(size=(1, 100, 24)).astype(np.float32)
        chosen, shares = routed(model, 1, x)
        found |= {"router/x": x, "router/chosen": chosen, "router/shares": shares}
    return found


def goldens(family: str) -> dict[str, Any]:
    """Everything a family's file holds."""
    rng = np.random.default_rng(404)
    model, queries = torch_model(family), make_ids(rng)
    tokens = rng.integers(0, 64, (2, 20))
    order = np.stack([rng.permutation(N_QUERIES)[:QUERIES_PER_STEP] for _ in range(STEPS)])
    batches = [[queries[i] for i in indices] for indices in order]
    with torch.no_grad():
        found = {
            "script": script_hash(),
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "config": json.dumps(model.config.to_dict(), default=str),
            "queries": json.dumps(queries),
            "tokens": tokens,
            "logits": model(torch.tensor(tokens)).logits.numpy(),
            "greedy": np.array([greedy(model, query["prompts"][0]) for query in queries]),
            "mean_logps": np.stack([matrix(model, query, "mean").numpy() for query in queries]),
            "sum_logps": np.stack([matrix(model, query, "sum").numpy() for query in queries]),
            "order": order,
        }
    found |= {f"weights/{name}": array for name, array in named(model.state_dict()).items()}
    found |= ladder(model, rng)
    sami_loss(model, batches[0]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"gradients/{name}": array for name, array in named(gradients).items()}
    found["adamw_losses"] = np.array(train(family, batches, torch.optim.AdamW, lr=1e-3))
    found["rmsprop_losses"] = np.array(train(family, batches, torch.optim.RMSprop, lr=1e-4))
    return found


if __name__ == "__main__":
    for name in MADE:
        np.savez_compressed(HERE / f"{name}.npz", **goldens(name))
