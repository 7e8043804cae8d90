"""Sampling in slots against `transformers.generate` with its own stop strings: kept tokens per second, same texts.

    pip install -e ".[train,parity]"
    python benchmarks/generate.py --short    # short texts, about a minute
    python benchmarks/generate.py            # lengths of TL;DR, some twenty minutes on two cores

The model is a transformer of 4 layers (D 512, V 32000) whose texts are planted: its layers compute all they always do,
but add so little to the embedding of the last token that the head decides, which knows one successor of each token. So
every prompt has a response of its own, of a recorded length, which ends with a marker of two tokens, and goes on behind
it as base models do. Prompts have 460 +- 90 tokens, responses are log-normal with a mean of 109 tokens.

The peer reads a batch of as many prompts as there are slots, padded on the left, and runs until its last row has said
the marker or all new tokens. Its table of tokens for the stop strings is made once, and not measured: `generate` makes
it anew in every call, which takes longer than the batch. Ours is what `sami run` does. The kept texts must be equal, or
nothing is measured; then both run in turn, and what is printed is

- kept tokens per second of both, medians, and their ratio;
- decode steps of both, and of a static batch that runs to the longest allowed response, as the authors sample;
- a full batch: as many prompts as slots, 64 tokens long, 96 new tokens each without any stops. Both do the same steps,
  of equal ids, so that this is the speed of a step.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

import numpy as np
from lengths import draw_pairs

MARKER, BYTES = "##", 300  # tokens below this are those of the tokenizer's alphabet
VOCAB, EMBED, LAYERS = 32000, 512, 4


def write_tokenizer(folder: pathlib.Path) -> Any:
    """A byte-level tokenizer whose further tokens are words; the last 2000 end and begin with half of the marker."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *alphabet, *(f"<spare{i}>" for i in range(BYTES - 2 - len(alphabet)))]
    names += [f"Ġw{i}" for i in range(VOCAB - 2000 - len(names))]
    names += [text for i in range(1000) for text in (f"Ġe{i}#", f"#a{i}")]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def plant(folder: pathlib.Path, prompts: list[list[int]], lengths: Sequence[int]) -> Any:
    """A model folder in which prompt i is followed by `lengths[i]` words and the marker. Changes the prompts' ends."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=EMBED,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = transformers.LlamaForCausalLM(shape).eval()
    words = iter(range(BYTES, VOCAB - 2000))
    ends = iter(range(VOCAB - 2000, VOCAB, 2))
    follows: dict[int, int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        chain = [next(words) for _ in range(length + 1)]
        prompt[-1], end = chain[0], next(ends)
        chain += [end, end + 1, chain[1]]  # half of the marker, the other half, and the same again
        follows |= dict(zip(chain, chain[1:], strict=False))
    with torch.no_grad():
        embedding = torch.randn(VOCAB, EMBED)
        model.model.embed_tokens.weight.copy_(embedding)
        head = 0.02 * torch.randn(VOCAB, EMBED)
        for token, successor in follows.items():
            head[successor] += embedding[token]
        model.lm_head.weight.copy_(head)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    model.save_pretrained(folder)
    return model


class Peer:
    """transformers.generate, a batch after the other."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], *, rows: int, most: int, tokenizer: Any = None):
        self.model, self.prompts, self.rows, self.most = model, prompts, rows, most
        self.steps = 0
        from transformers import StoppingCriteriaList, StopStringCriteria

        # Without a tokenizer it writes on to the last token.
        self.stopping = StoppingCriteriaList([StopStringCriteria(tokenizer, [MARKER])] if tokenizer else [])
        self.least = None if tokenizer else most

    def __call__(self) -> list[list[int]]:
        """Each prompt's new ids."""
        import torch

        found: list[list[int]] = []
        self.steps = 0
        for start in range(0, len(self.prompts), self.rows):
            batch = self.prompts[start : start + self.rows]
            width = max(map(len, batch))
            ids = torch.tensor([[1] * (width - len(prompt)) + list(prompt) for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            with torch.no_grad():
                out = self.model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=self.most,
                    min_new_tokens=self.least,
                    stopping_criteria=self.stopping,
                    pad_token_id=1,
                )
            found += out[:, width:].tolist()
            self.steps += out.shape[1] - width
        return found


class Ours:
    """What `sami run` does."""

    def __init__(
        self, folder: pathlib.Path, prompts: Sequence[Sequence[int]], *, slots: int, most: int, stop: tuple[str, ...]
    ):
        from sami_jax.config.mesh import MeshConfig
        from sami_jax.config.sampling import SamplingConfig
        from sami_jax.data.prompts import Prompt
        from sami_jax.huggingface.opened import load_model

        self.loaded = load_model(folder, MeshConfig(), "float32")
        self.prompts = [Prompt("", tuple(ids)) for ids in prompts]
        self.config = SamplingConfig(max_new_tokens=most, stop=stop, slots=slots)
        self.steps = 0

    def __call__(self) -> list[Any]:
        """Each prompt's response."""
        from sami_jax.responding import respond

        spent: list[Any] = []
        found = respond(self.loaded, self.prompts, self.config, progressed=spent.append)
        self.steps = spent[-1].chunks * self.config.chunk_steps
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="texts of a fifth of the lengths, 32 prompts")
    parser.add_argument("--prompts", type=int, help="how many prompts (default 128, eight to a slot)")
    parser.add_argument("--slots", type=int, default=16, help="slots of ours, rows of the peer's batch (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each (default 3)")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    count, length = arguments.prompts or (32 if arguments.short else 128), 0.2 if arguments.short else 1.0
    most = round(350 * length)
    pairs = draw_pairs(count, 1, vocab=VOCAB - 2000, length=length)
    prompts = [[BYTES + i % (VOCAB - 2000 - BYTES) for i in pair.prompt_ids[0]] for pair in pairs]
    lengths = [min(len(pair.response_ids[0]), most - 2) for pair in pairs]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokenizer = write_tokenizer(folder)
        model, rows = plant(folder, prompts, lengths), arguments.slots
        peer = Peer(model, prompts, rows=rows, most=most, tokenizer=tokenizer)
        ours = Ours(folder, prompts, slots=rows, most=most, stop=(MARKER,))
        kept = equal_texts(peer(), ours(), ours, lengths)
        seconds = medians(peer, ours, arguments.rounds)
        full = [prompt[-64:] for prompt in prompts[:rows]]
        full_peer = Peer(model, full, rows=rows, most=96)
        full_ours = Ours(folder, full, slots=rows, most=96, stop=())
        if full_peer() != [list(response.ids) for response in full_ours()]:
            raise SystemExit("The ids of the full batch differ; nothing is measured.")
        full_seconds = medians(full_peer, full_ours, max(5, arguments.rounds))
    static = most * -(-count // arguments.slots)
    figures: dict[str, Any] = {
        "prompts": count,
        "slots": arguments.slots,
        "kept_tokens": kept,
        "peer_tokens_per_s": kept / seconds["peer"],
        "ours_tokens_per_s": kept / seconds["ours"],
        "ratio": seconds["peer"] / seconds["ours"],
        "steps": {"ours": ours.steps, "peer": peer.steps, "to_the_longest": static},
        "fewer_steps": {"than_peer": peer.steps / ours.steps, "than_to_the_longest": static / ours.steps},
        "full_batch": {"seconds": full_seconds, "ratio": full_seconds["peer"] / full_seconds["ours"]},
    }
    print(
        f"{count} prompts of {round(np.mean([len(p) for p in prompts]))} tokens, {kept} kept tokens in equal texts, "
        f"{arguments.slots} slots\n"
        f"kept tokens/s: transformers {figures['peer_tokens_per_s']:.1f}, ours {figures['ours_tokens_per_s']:.1f}: "
        f"{figures['ratio']:.2f}x\n"
        f"decode steps: to the longest response {static}, transformers {peer.steps}, ours {ours.steps}: "
        f"{static / ours.steps:.2f}x and {peer.steps / ours.steps:.2f}x fewer\n"
        f"full batch of {len(full)} x 96 new tokens, equal ids: transformers {full_seconds['peer']:.2f} s, "
        f"ours {full_seconds['ours']:.2f} s: {figures['full_batch']['ratio']:.2f}x"
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


def medians(peer: Peer, ours: Ours, rounds: int) -> dict[str, float]:
    """Seconds of both, run in turn."""
    times: dict[str, list[float]] = {"peer": [], "ours": []}
    for number in range(rounds):
        both: list[tuple[str, Peer | Ours]] = [("peer", peer), ("ours", ours)]
        for name, run in both if number % 2 == 0 else both[::-1]:
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(those) for name, those in times.items()}


def equal_texts(theirs: list[list[int]], responses: list[Any], ours: Ours, lengths: Sequence[int]) -> int:
    """Kept tokens. Raises SystemExit where a text differs, or is not as long as it was planted."""
    from sami_jax.sampling.stop_text import Stops, cut_response

    stops = Stops(frozenset(ours.loaded.end_ids), (MARKER,))
    cut = [cut_response(ids, ours.loaded.tokenizer, stops) for ids in theirs]
    differing = [i for i, pair in enumerate(zip(cut, responses, strict=True)) if pair[0] != pair[1]]
    if differing:
        raise SystemExit(f"The texts of prompts {differing[:5]} differ; nothing is measured.")
    words = [len(response.text.split()) - 1 for response in responses]  # the marker's first half leaves a piece
    if words != list(lengths):
        raise SystemExit(f"Planted {list(lengths)[:8]} words, but found {words[:8]}.")
    return sum(len(response.ids) for response in responses)


if __name__ == "__main__":
    main()
