"""One optimizer step against a PyTorch step that does what the authors' trainer does, on the same weights and queries.

    pip install -e ".[train,parity]"
    python benchmarks/train_step.py --short               # a small model, about a minute
    python benchmarks/train_step.py --out=train_step.json # C = 2, 4 and 8, some ten minutes on two cores

The peer is transformers' model: every cell of the C x C matrix a full sequence, padded to the query's longest, logits
of all positions, log-probs of the response tokens gathered from them, one query at a time with gradients accumulated,
torch's RMSprop. Ours is `sami_jax.training.make_train_step` on packed rows, as many in memory as one query needs.
Lengths are like those of TL;DR: prompts of 460 +- 90 tokens, responses log-normal with a mean of 109.

Each of the two runs in a process of its own, in turn (A B, B A, ...); the first losses must be equal, or nothing is
measured. Then, for each C:

- raw: the peer's median time over ours.
- normalised: the same, each time multiplied by the speed of its framework's own matmul (1024 x 1024, measured between
  the steps): what is left when torch's and XLA's matrix libraries are taken for equally fast.
- peak: most memory of a process during a step, less what it holds between steps (weights, optimizer).

On CPUs. bfloat16 is measured too where torch's matmul reaches a quarter of its float32 speed there.
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, here and in the processes below

from sami_jax.data.pairs import Pair
from sami_jax.types import Dtype

LEARNING_RATE = 1e-6
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the loss: its error is that of log-probs near 10
MATMUL = 1024


class Case(NamedTuple):
    """What is measured: C, a step's queries, and the model's sizes."""

    constitutions: int
    queries: int
    layers: int
    embed: int
    vocab: int
    length: float = 1.0  # times the lengths of TL;DR


CASES = [
    Case(2, 2, 4, 512, 32000),
    Case(4, 1, 4, 512, 32000),
    Case(8, 1, 4, 256, 8000),  # the peer takes 45 GB for a query of the larger model
]
SHORT = [Case(2, 2, 2, 128, 2000, 0.25), Case(4, 1, 2, 128, 2000, 0.25)]


class Measured(NamedTuple):
    """One step: its loss in nats, seconds, most bytes held during it beyond those held before."""

    loss: float
    seconds: float
    peak: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a small model, C = 2 and 4, three rounds")
    parser.add_argument("--out", type=pathlib.Path, help="JSON with every number")
    parser.add_argument("--rounds", type=int, help="steps of each (default: 5, with --short 3)")
    parser.add_argument("--only", type=int, help="this number of constitutions")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.short else 5)
    cases = [c for c in (SHORT if arguments.short else CASES) if arguments.only in (None, c.constitutions)]
    results, equal = [], True
    print(
        "                              slots           seconds                matmul GFLOP/s                   peak MiB"
    )
    print(
        "dtype      C  theirs    ours (real)     theirs    ours     raw    theirs  ours   normalised    theirs   ours"
    )
    for dtype in ("float32", "bfloat16"):
        for case in cases:
            found = measure(case, dtype, rounds)
            if found is None:
                print(f"{dtype}  not measured: torch's matmul does not reach a quarter of its float32 speed here")
                break
            results.append(found)
            equal &= found["equal"]
            print(line(found), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if equal else 1


def measure(case: Case, dtype: str, rounds: int) -> dict[str, Any] | None:
    """Every number of a case; None where torch has no fast matmul of this dtype."""
    pairs = draw_pairs(case)
    with tempfile.TemporaryDirectory() as folder:
        save_model(pathlib.Path(folder), case)
        theirs, ours = (Worker(kind, folder, pairs, dtype) for kind in (torch_steps, jax_steps))
        try:
            if dtype == "bfloat16" and theirs.ask("matmul", "bfloat16") < theirs.ask("matmul", "float32") / 4:
                return None
            first = [worker.ask("step") for worker in (theirs, ours)]  # compiles, and warms up
            found = {**case._asdict(), "dtype": dtype, "losses": [one.loss for one in first]}
            found["slots"] = [worker.ask("slots") for worker in (theirs, ours)]
            difference = abs(first[0].loss - first[1].loss)
            found["equal"] = bool(difference <= TOLERANCE[dtype] * max(1.0, abs(first[0].loss)))
            if found["equal"]:
                steps, speeds = interleaved([theirs, ours], rounds, dtype)
                found["seconds"] = [statistics.median(step.seconds for step in one) for one in steps]
                found["all_seconds"] = [[step.seconds for step in one] for one in steps]
                found["gflops"] = [statistics.median(one) for one in speeds]
                found["peaks"] = [max(step.peak for step in one) for one in steps]
                found["raw"] = found["seconds"][0] / found["seconds"][1]
                found["normalised"] = found["raw"] * found["gflops"][0] / found["gflops"][1]
                found["peak"] = found["peaks"][0] / found["peaks"][1]
            return found
        finally:
            for worker in (theirs, ours):
                worker.end()


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"{found['dtype']:9} {found['constitutions']:2}  "
    if not found["equal"]:
        return f"{start}losses differ, nothing was measured: {found['losses'][0]} (theirs), {found['losses'][1]} (ours)"
    (slots, _), (ours, real) = found["slots"]
    seconds, gflops, peaks = (found[key] for key in ("seconds", "gflops", "peaks"))
    return (
        f"{start}{slots:6}  {ours:6} ({real:4.0%})  {seconds[0]:9.2f} {seconds[1]:7.2f} {found['raw']:6.2f}x "
        f"{gflops[0]:9.0f} {gflops[1]:5.0f} {found['normalised']:11.2f}x "
        f"{peaks[0] / 2**20:9.0f} {peaks[1] / 2**20:6.0f} ({found['peak']:.1f}x)"
    )


def interleaved(workers: "Sequence[Worker]", rounds: int, dtype: str) -> tuple[list[list[Measured]], list[list[float]]]:
    """The steps of each worker, and its matmul's GFLOP/s, in turn: A B, B A, ..."""
    steps: list[list[Measured]] = [[] for _ in workers]
    speeds: list[list[float]] = [[] for _ in workers]
    for number in range(rounds):
        order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
        for index in order:
            speeds[index].append(workers[index].ask("matmul", dtype))
            steps[index].append(workers[index].ask("step"))
    return steps, speeds


class Worker:
    """A framework in a process of its own, which answers "step", "matmul" and "slots"."""

    def __init__(self, kind: Callable[..., dict[str, Callable]], folder: str, pairs: Sequence[Pair], dtype: str):
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(kind, folder, pairs, dtype, theirs))
        self._process.start()
        theirs.close()

    def ask(self, *question: str) -> Any:
        self._ours.send(question)
        return self._ours.recv()

    def end(self) -> None:
        self._ours.close()
        self._process.join()


def _serve(
    kind: Callable[..., dict[str, Callable]], folder: str, pairs: Sequence[Pair], dtype: str, pipe: Connection
) -> None:
    answers = kind(folder, pairs, dtype)
    try:
        while True:
            name, *given = pipe.recv()
            pipe.send(answers[name](*given))
    except EOFError:
        return


def draw_pairs(case: Case) -> list[Pair]:
    """Queries of random tokens whose lengths are like those of TL;DR's posts and summaries."""
    rng = np.random.default_rng(0)

    def ids(length: float) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(3, case.vocab, max(1, round(length * case.length))))

    pairs = []
    for number in range(case.queries):
        post = rng.normal(460, 90)
        prompts = [ids(np.clip(post + rng.normal(0, 10), 80, 900)) for _ in range(case.constitutions)]
        responses = [ids(np.clip(rng.lognormal(np.log(94), 0.56), 5, 350)) for _ in range(case.constitutions)]
        pairs.append(Pair(number, (), (), tuple(prompts), tuple(responses)))
    return pairs


def save_model(folder: pathlib.Path, case: Case) -> None:
    """A Mistral of random weights, whose responses differ in likelihood, as transformers writes it."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    heads = case.embed // 64
    config = MistralConfig(
        vocab_size=case.vocab,
        hidden_size=case.embed,
        intermediate_size=3 * case.embed,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=4096,
        sliding_window=None,
        initializer_range=case.embed**-0.5,
    )
    MistralForCausalLM(config).save_pretrained(folder)


def torch_steps(folder: str, pairs: Sequence[Pair], dtype: str) -> dict[str, Callable]:
    """The authors' way."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    update = torch.optim.RMSprop(model.parameters(), lr=LEARNING_RATE, alpha=0.99, eps=1e-8)
    count = len(pairs[0].prompt_ids)
    batches = [_cells(pair) for pair in pairs]

    def loss_of(tokens: np.ndarray, real: np.ndarray, labelled: np.ndarray) -> Any:
        ids = torch.tensor(tokens)
        logits = model(input_ids=ids, attention_mask=torch.tensor(real), use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        mask = torch.tensor(labelled[:, 1:])
        matrix = ((logps * mask).sum(-1) / mask.sum(-1)).reshape(count, count)
        return (F.cross_entropy(matrix, torch.arange(count)) + F.cross_entropy(matrix.T, torch.arange(count))) / 2

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = loss_of(*batch) / len(batches)
            loss.backward()
            total += loss.item()
        update.step()
        update.zero_grad()
        return total

    def matmul(name: str) -> float:
        x = torch.ones(MATMUL, MATMUL, dtype=getattr(torch, name))
        return _gflops(lambda: x @ x)

    slots = sum(tokens.size for tokens, _, _ in batches)
    return {"step": functools.partial(_measured, step), "matmul": matmul, "slots": lambda: (slots, None)}


def _cells(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C x C full sequences, padded on the right: tokens, which are real, which are of the response."""
    cells = [(prompt, ids) for prompt in pair.prompt_ids for ids in pair.response_ids]
    width = max(len(prompt) + len(ids) for prompt, ids in cells)
    tokens, real, labelled = np.zeros((3, len(cells), width), np.int64)
    for row, (prompt, ids) in enumerate(cells):
        end = len(prompt) + len(ids)
        tokens[row, :end], real[row, :end], labelled[row, len(prompt) : end] = (*prompt, *ids), 1, 1
    return tokens, real, labelled


def jax_steps(folder: str, pairs: Sequence[Pair], dtype: Dtype) -> dict[str, Callable]:
    """Packed rows."""
    import jax
    import jax.numpy as jnp

    from sami_jax.config.mesh import MeshConfig
    from sami_jax.config.training import TrainConfig
    from sami_jax.huggingface.folder import load_params, read_config
    from sami_jax.model.decoder import make_model, sharded_params
    from sami_jax.scoring.matrices import shardings_of_rows
    from sami_jax.scoring.packed_rows import pack_rows
    from sami_jax.sharding import make_mesh, put_on_devices
    from sami_jax.stages.score import Scoring, row_limits
    from sami_jax.training import abstract_state, init_state, make_optimizer, make_train_step

    mesh, shape = make_mesh(MeshConfig()), read_config(pathlib.Path(folder))
    train = TrainConfig(
        queries_per_step=len(pairs),
        rows_per_device=len(pairs[0].prompt_ids),
        optimizer="rmsprop",
        learning_rate=LEARNING_RATE,
        remat="none",
        weights=dtype,
    )
    model = make_model(shape, mesh=mesh, dtype=dtype)
    packing = pack_rows([pairs], row_limits(model, mesh, Scoring.of(train)))
    batch = put_on_devices(packing.stacked(0), shardings_of_rows(mesh, stacked=True))
    specs = abstract_state(sharded_params(shape, mesh, dtype), make_optimizer(train))
    shardings = jax.tree.map(lambda spec: spec.sharding, specs)
    params = load_params(pathlib.Path(folder), shape, dtype=jnp.dtype(dtype), shardings=shardings.params)
    step_fn = make_train_step(model.rows, train)
    states = [put_on_devices(init_state(params, make_optimizer(train)), shardings)]

    def step() -> float:
        state, metrics = step_fn(states.pop(), None, batch)
        states.append(jax.block_until_ready(state))
        return float(metrics.loss)

    def matmul(name: str) -> float:
        x, product = jnp.ones((MATMUL, MATMUL), name), jax.jit(lambda x: x @ x)
        return _gflops(lambda: product(x).block_until_ready())

    slots = packing.layout.rows * packing.layout.width * packing.depth
    return {
        "step": functools.partial(_measured, step),
        "matmul": matmul,
        "slots": lambda: (slots, packing.real_share),
    }


def _measured(step: Callable[[], float]) -> Measured:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, started = _status("VmRSS"), time.monotonic()
    loss = step()
    return Measured(loss, time.monotonic() - started, _status("VmHWM") - before)


def _status(name: str) -> int:
    """Bytes, from the kernel."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _gflops(product: Callable[[], Any]) -> float:
    """The median of a few."""
    seconds = []
    product()
    for _ in range(5):
        started = time.monotonic()
        product()
        seconds.append(time.monotonic() - started)
    return 2 * MATMUL**3 / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    sys.exit(main())
