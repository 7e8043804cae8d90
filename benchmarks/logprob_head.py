"""The head in chunks against the logits of all labels at once: time and temporary memory, forward and backward.

    pip install -e ".[train]"
    python benchmarks/logprob_head.py                 # D = 512, V = 32000, two minutes on two cores
    python benchmarks/logprob_head.py --device=gpu    # D = 4096, bfloat16, V = 32000 and 128256

The peer is what one writes first: `jax.nn.log_softmax` of float32 logits, and JAX's own gradient of it. Log-probs
(nats) and both gradients (relative to each one's largest entry) are first found equal; then the runs take turns, and
the medians are printed. Temporaries are those of the compiled program. With KL, both also compute KL to a reference and
its gradient. The chunk that a run takes by itself is marked *.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

if "--device=gpu" not in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from sami_jax.scoring.head import default_chunk, label_terms, logits_of
from sami_jax.types import Reference

CASES = {"cpu": [(720, 512, 32000), (4096, 512, 32000)], "gpu": [(4096, 4096, 32000), (4096, 4096, 128256)]}
# Of float32 sums of 512 terms in another order; of bfloat16, the rounding of the results and of the logits' gradient.
TOLERANCE = {"float32": (2e-5, 1e-5), "bfloat16": (2e-4, 2e-2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CASES, default="cpu", help="where (default: cpu)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: 7)")
    parser.add_argument("--short", action="store_true", help="the first case, three rounds")
    arguments = parser.parse_args()
    dtype = {"cpu": "float32", "gpu": "bfloat16"}[arguments.device]
    rounds, equal = 3 if arguments.short else arguments.rounds, True
    print("labels     D       V  KL   chunk    seconds   full / this   temporaries MiB")
    for labels, embed, vocab in CASES[arguments.device][: 1 if arguments.short else None]:
        for kl in (False, True):
            equal &= compare(labels, embed, vocab, dtype, arguments.device, kl=kl, rounds=rounds)
    return 0 if equal else 1


def compare(labels: int, embed: int, vocab: int, dtype: str, device: str, *, kl: bool, rounds: int) -> bool:
    """Prints a case's lines; returns whether all results are equal."""
    inputs = draw(labels, embed, vocab, dtype)
    chosen = default_chunk(vocab, embed, device)
    chunks = sorted({128, 256, 512, 1024, min(chosen, labels), labels} & set(range(1, labels + 1)))
    # Arguments and not constants, which XLA would keep, and fold.
    programs = {chunk: compiled(chunk, inputs, kl=kl) for chunk in (None, *chunks)}
    start = f"{labels:6} {embed:5} {vocab:7}  {'yes' if kl else 'no ':3}"
    expected = programs[None](*inputs)
    for chunk in chunks:
        found = programs[chunk](*inputs)
        nats, slope = TOLERANCE[dtype]
        (logps, *gradients), (logps_, *gradients_) = found, expected
        worst = float(jnp.abs(logps - logps_).max()), max(map(difference, gradients, gradients_))
        if not (worst[0] <= nats and worst[1] <= slope):
            print(f"{start}  {chunk:6}  differs by {worst[0]:.1e} nats, {worst[1]:.1e} of a gradient; not measured")
            return False
    seconds: dict[int | None, list[float]] = {chunk: [] for chunk in programs}
    for number in range(rounds):
        for which in list(programs) if number % 2 == 0 else reversed(programs):
            started = time.monotonic()
            jax.block_until_ready(programs[which](*inputs))
            seconds[which].append(time.monotonic() - started)
    full = statistics.median(seconds[None])
    for which, program in programs.items():
        median, size = statistics.median(seconds[which]), program.memory_analysis().temp_size_in_bytes / 2**20
        name = "full" if which is None else f"{which}{'*' * (which == min(chosen, labels))}"
        print(f"{start}  {name:>6}  {median:9.4f}  {full / median:11.2f}x  {size:12.0f}", flush=True)
    return True


def draw(labels: int, embed: int, vocab: int, dtype: str) -> tuple[Any, ...]:
    """Hidden states, head, those of a reference, labels, and cotangents, half of which are 0."""
    keys = jax.random.split(jax.random.key(0), 7)
    hidden, other = (jax.random.normal(key, (1, labels, embed), dtype) for key in keys[:2])
    head, other_head = (jax.random.normal(key, (embed, vocab), dtype) * 2 * embed**-0.5 for key in keys[2:4])
    at = jax.random.randint(keys[4], (1, labels), 0, vocab)
    cotangents = jax.random.normal(keys[5], (2, 1, labels)) * jax.random.bernoulli(keys[6], 0.5, (2, 1, labels))
    return hidden, head.astype(dtype), Reference(other, other_head.astype(dtype)), at, cotangents


def compiled(chunk: int | None, inputs: tuple[Any, ...], *, kl: bool) -> Any:
    """inputs -> log-probs and the gradients of hidden states and head; in chunks, or of all logits at once for None."""

    def run(hidden: Any, head: Any, reference: Reference, labels: Any, cotangents: Any) -> Any:
        other = reference if kl else None
        terms: Callable[..., Any] = at_once if chunk is None else label_terms
        how = {} if chunk is None else {"chunk": chunk}
        (logps, kls), pull = jax.vjp(lambda *xs: terms(*xs, labels, other, **how), hidden, head)
        return logps, *pull((cotangents[0], cotangents[1] * kl)), kls

    return jax.jit(lambda *xs: run(*xs)[:3]).lower(*inputs).compile()


def at_once(hidden: Any, head: Any, labels: Any, reference: Reference | None) -> tuple[Any, Any]:
    """`label_terms` as one writes it first."""
    policy = jax.nn.log_softmax(logits_of(hidden, head))
    logps = jnp.take_along_axis(policy, labels[..., None], axis=-1)[..., 0]
    if reference is None:
        return logps, jnp.zeros_like(logps)
    other = jax.nn.log_softmax(logits_of(*reference))
    return logps, jnp.sum(jnp.exp(policy) * (policy - other), axis=-1)


def difference(ours: Any, theirs: Any) -> float:
    ours, theirs = (x.astype(jnp.float32) for x in (ours, theirs))
    return float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())


if __name__ == "__main__":
    sys.exit(main())
