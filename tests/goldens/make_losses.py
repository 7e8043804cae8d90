"""Writes losses.json: what torch says about the loss, in float64. Run by hand, with torch installed, from anywhere.

python tests/goldens/make_losses.py
"""

import hashlib
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F


def contrast(size: int) -> dict[str, object]:
    rng = np.random.default_rng([404, size])
    inputs = rng.normal(-3.0, 1.5, (size, size)).round(3).tolist()
    logps = torch.tensor(inputs, dtype=torch.float64, requires_grad=True)
    positives = torch.arange(size)
    over_responses = F.cross_entropy(logps, positives)
    over_constitutions = F.cross_entropy(logps.T, positives)
    loss = (over_responses + over_constitutions) / 2
    (gradient,) = torch.autograd.grad(loss, logps)
    return {
        "logps": inputs,
        "loss": loss.item(),
        "over_responses": over_responses.item(),
        "over_constitutions": over_constitutions.item(),
        "gradient": gradient.tolist(),
    }


def response(tokens: int, vocab: int) -> dict[str, object]:
    rng = np.random.default_rng([404, tokens, vocab])
    inputs = rng.normal(0.0, 2.0, (2, tokens, vocab)).round(3).tolist()
    logits, reference_logits = torch.tensor(inputs, dtype=torch.float64)
    targets = torch.tensor(rng.integers(0, vocab, tokens))
    mask = torch.tensor([False, False, *[True] * (tokens - 3), False])  # prompt, response, padding
    log_probs, reference_log_probs = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    token_logps = log_probs.gather(-1, targets[:, None])[:, 0]
    kl = F.kl_div(reference_log_probs, log_probs, reduction="none", log_target=True).sum(-1)
    return {
        "logits": inputs[0],
        "reference_logits": inputs[1],
        "targets": targets.tolist(),
        "mask": mask.tolist(),
        "token_logps": token_logps.tolist(),
        "mean_logps": token_logps[mask].mean().item(),
        "sum_logps": token_logps[mask].sum().item(),
        "kl": kl[mask].mean().item(),
    }


def goldens() -> dict[str, object]:
    return {
        "script": hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest(),
        "made_by": f"tests/goldens/make_losses.py, torch {torch.__version__}, float64",
        "contrast": [contrast(size) for size in range(2, 9)],
        "response": response(tokens=7, vocab=5),
    }


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("losses.json").write_text(json.dumps(goldens()) + "\n")
