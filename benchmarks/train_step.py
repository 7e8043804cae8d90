"""One optimizer step against a PyTorch step that does what the authors' trainer does, on the same weights and queries.

    pip install -e ".[train,parity]"
    python benchmarks/train_step.py --short               # a small model, about a minute
    python benchmarks/train_step.py --out=train_step.json # C = 2, 4 and 8, some fifteen minutes on two cores
    python benchmarks/train_step.py --device=gpu          # a model of a billion weights, in bfloat16; --size=7b

The peer is transformers' model: every cell of the C x C matrix a full sequence, padded to the query's longest, logits
of all positions, log-probs of the response tokens gathered from them, one query at a time with gradients accumulated,
torch's RMSprop. Ours is `sami_jax.training.make_train_step` on packed rows, as many in memory as one query needs.
Lengths are like those of TL;DR: prompts of 460 +- 90 tokens, responses log-normal with a mean of 109.

Each runs in a process of its own, in turn (A B, B A, ...): the peer, ours as fast as it can (no layer computed twice),
ours in little memory (remat=full, the default of a run), and ours with KL to the base. The first losses must be equal,
or nothing is measured. Then, for each C:

- raw: the peer's median time over ours.
- normalised: the same, each time multiplied by the speed of its framework's own matmul (1024 x 1024, measured between
  the steps): what is left when torch's and XLA's matrix libraries are taken for equally fast.
- peak: most memory of a process (on a GPU, of the device) during a step, less what it holds between steps (weights,
  optimizer).
- use: FLOPs of a second over those of the matmul, twice: those that ours executes, and those that the authors' layout
  would have needed, which may be above 1. On a GPU the matmul is 8192 x 8192.
- little memory, KL: time and peak of these over those of ours, and the seconds that reading the base took, once.

On a CPU, bfloat16 is measured too where torch's matmul reaches a quarter of its float32 speed there.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

# Before jax is imported, here and in the processes below.
os.environ["TRAIN_STEP_DEVICE"] = "gpu" if "--device=gpu" in sys.argv else os.environ.get("TRAIN_STEP_DEVICE", "cpu")
os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda,cpu"}[os.environ["TRAIN_STEP_DEVICE"]]
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share a GPU

from lengths import draw_pairs, full_flops, full_sequences

from sami_jax.data.pairs import Pair
from sami_jax.types import Dtype, Remat

DEVICE = os.environ["TRAIN_STEP_DEVICE"]
LEARNING_RATE = 1e-6
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the loss: its error is that of log-probs near 10
MATMUL = {"cpu": 1024, "gpu": 8192}[DEVICE]


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
ON_GPU = {
    "1b": [Case(2, 8, 16, 2048, 32000), Case(4, 4, 16, 2048, 32000), Case(8, 1, 16, 2048, 32000)],
    "7b": [Case(2, 4, 32, 4096, 32000), Case(4, 1, 32, 4096, 32000)],
}
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
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where (default: cpu)")
    parser.add_argument("--size", choices=ON_GPU, default="1b", help="of the model on a GPU (default: 1b)")
    parser.add_argument("--alone", action="store_true", help="ours without the peer, for models that leave it no room")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.short else 5)
    cases = ON_GPU[arguments.size] if DEVICE == "gpu" else CASES
    cases = [c for c in (SHORT if arguments.short else cases) if arguments.only in (None, c.constitutions)]
    results, equal = [], True
    print(
        "                              slots           seconds                matmul GFLOP/s                   peak MiB"
    )
    print(
        "dtype      C  theirs    ours (real)     theirs    ours     raw    theirs  ours   normalised    theirs   ours"
    )
    for dtype in ("float32", "bfloat16") if DEVICE == "cpu" else ("bfloat16",):
        for case in cases:
            found = measure(case, dtype, rounds, alone=arguments.alone)
            if found is None:
                print(f"{dtype}  not measured: torch's matmul does not reach a quarter of its float32 speed here")
                break
            results.append(found)
            equal &= found["equal"]
            print(lines(found), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if equal else 1


def measure(case: Case, dtype: str, rounds: int, *, alone: bool = False) -> dict[str, Any] | None:
    """Every number of a case; None where torch has no fast matmul of this dtype."""
    pairs = draw_pairs(case.queries, case.constitutions, vocab=case.vocab, length=case.length)
    found: dict[str, Any] = {**case._asdict(), "dtype": dtype, "device": DEVICE, "losses": {}}
    kinds: dict[str, Callable[..., dict[str, Callable]]] = {
        "theirs": torch_steps,
        "ours": jax_steps,
        "little memory": jax_in_little_memory,
        "KL": jax_with_kl,
    }
    names = [name for name in kinds if not (alone and name == "theirs")]
    with tempfile.TemporaryDirectory() as folder:
        save_model(pathlib.Path(folder), case, dtype)
        # A GPU has memory for one at a time, and no other work beside it.
        for together in [names] if DEVICE == "cpu" else [[name] for name in names]:
            workers = [Worker(kinds[name], folder, pairs, dtype) for name in together]
            try:
                if dtype == "bfloat16" and DEVICE == "cpu" and not alone:
                    rough, exact = (workers[0].ask("matmul", name) for name in ("bfloat16", "float32"))
                    if rough < exact / 4:
                        return None
                # The first step compiles, and warms up; at the base KL is 0.
                found["losses"] |= {
                    name: worker.ask("step").loss for name, worker in zip(together, workers, strict=True)
                }
                if not all_equal(found["losses"].values(), TOLERANCE[dtype]):
                    break
                found |= measured(dict(zip(together, workers, strict=True)), rounds, dtype)
            finally:
                for worker in workers:
                    worker.end()
    return found | {"equal": all_equal(found["losses"].values(), TOLERANCE[dtype])}


def all_equal(losses: Collection[float], tolerance: float) -> bool:
    """Whether they are, for what float sums in another order make of them."""
    return max(losses) - min(losses) <= tolerance * max(1.0, *map(abs, losses))


def measured(workers: "dict[str, Worker]", rounds: int, dtype: str) -> dict[str, Any]:
    """Of each worker: seconds, GFLOP/s of its matmul, bytes, and what it says of itself."""
    steps, speeds = interleaved(list(workers.values()), rounds, dtype)
    return {
        name: {
            "seconds": statistics.median(step.seconds for step in one),
            "all_seconds": [step.seconds for step in one],
            "gflops": statistics.median(speed),
            "peak": max(step.peak for step in one),
            **workers[name].ask("facts"),
        }
        for name, one, speed in zip(workers, steps, speeds, strict=True)
    }


def lines(found: dict[str, Any]) -> str:
    """A row of the table, and what belongs to it."""
    start = f"{found['dtype']:9} {found['constitutions']:2}  "
    if not found["equal"]:
        return f"{start}losses differ, nothing was measured: {found['losses']}"
    ours, little, kl = (found[name] for name in ("ours", "little memory", "KL"))
    theirs = found.get("theirs", {"seconds": math.nan, "gflops": math.nan, "peak": math.nan, "slots": 0})
    raw = theirs["seconds"] / ours["seconds"]
    normalised = raw * theirs["gflops"] / ours["gflops"]
    executed, of_full = (flops / ours["seconds"] / ours["gflops"] / 1e9 for flops in ours["flops"])
    return (
        f"{start}{theirs['slots']:6}  {ours['slots']:6} ({ours['real']:4.0%})  {theirs['seconds']:9.2f} "
        f"{ours['seconds']:7.2f} {raw:6.2f}x {theirs['gflops']:9.0f} {ours['gflops']:5.0f} {normalised:11.2f}x "
        f"{theirs['peak'] / 2**20:9.0f} {ours['peak'] / 2**20:6.0f} ({theirs['peak'] / ours['peak']:.1f}x)\n"
        f"               use {executed:.0%} executed, {of_full:.0%} of full sequences; little memory: "
        f"{little['seconds'] / ours['seconds']:.2f}x the time, {theirs['seconds'] / little['seconds']:.2f}x raw, "
        f"{little['peak'] / 2**20:.0f} MiB ({theirs['peak'] / little['peak']:.1f}x); "
        f"KL: {kl['seconds'] / ours['seconds']:.2f}x the time of a step, {kl['peak'] / 2**20:.0f} MiB, "
        f"and {kl['reading']:.1f} s before the first"
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
    """A framework in a process of its own, which answers "step", "matmul" and "facts"."""

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


def save_model(folder: pathlib.Path, case: Case, dtype: str) -> None:
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
    with torch.device({"cpu": "cpu", "gpu": "cuda"}[DEVICE]):
        model: Any = MistralForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    del model
    if DEVICE == "gpu":
        torch.cuda.empty_cache()


def torch_steps(folder: str, pairs: Sequence[Pair], dtype: str) -> dict[str, Callable]:
    """The authors' way."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = {"cpu": "cpu", "gpu": "cuda"}[DEVICE]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.to(device)
    update = torch.optim.RMSprop(model.parameters(), lr=LEARNING_RATE, alpha=0.99, eps=1e-8)
    count = len(pairs[0].prompt_ids)
    batches = [_cells(pair) for pair in pairs]

    def loss_of(tokens: np.ndarray, real: np.ndarray, labelled: np.ndarray) -> Any:
        ids = torch.tensor(tokens, device=device)
        logits = model(input_ids=ids, attention_mask=torch.tensor(real, device=device), use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        mask, diagonal = torch.tensor(labelled[:, 1:], device=device), torch.arange(count, device=device)
        matrix = ((logps * mask).sum(-1) / mask.sum(-1)).reshape(count, count)
        return (F.cross_entropy(matrix, diagonal) + F.cross_entropy(matrix.T, diagonal)) / 2

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
        x = torch.randn(MATMUL, MATMUL, dtype=getattr(torch, name), device=device)

        def product() -> None:
            x @ x
            if device == "cuda":
                torch.cuda.synchronize()

        return _gflops(product)

    slots = sum(tokens.size for tokens, _, _ in batches)

    def held() -> tuple[int, int]:
        found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    measured = functools.partial(_measured, step, held if device == "cuda" else _process_held)
    return {"step": measured, "matmul": matmul, "facts": lambda: {"slots": slots}}


def _cells(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C x C full sequences, padded on the right: tokens, which are real, which are of the response."""
    cells = [(prompt, ids) for prompt in pair.prompt_ids for ids in pair.response_ids]
    [width] = full_sequences([pair])
    tokens, real, labelled = np.zeros((3, len(cells), width), np.int64)
    for row, (prompt, ids) in enumerate(cells):
        end = len(prompt) + len(ids)
        tokens[row, :end], real[row, :end], labelled[row, len(prompt) : end] = (*prompt, *ids), 1, 1
    return tokens, real, labelled


def jax_in_little_memory(folder: str, pairs: Sequence[Pair], dtype: Dtype) -> dict[str, Callable]:
    """Packed rows, every layer computed again."""
    return jax_steps(folder, pairs, dtype, remat="full")


def jax_with_kl(folder: str, pairs: Sequence[Pair], dtype: Dtype) -> dict[str, Callable]:
    """Packed rows, with KL to the base."""
    return jax_steps(folder, pairs, dtype, kl_beta=0.1)


def jax_steps(
    folder: str, pairs: Sequence[Pair], dtype: Dtype, *, remat: Remat = "none", kl_beta: float = 0.0
) -> dict[str, Callable]:
    """Packed rows."""
    import jax
    import jax.numpy as jnp

    from sami_jax.config.mesh import MeshConfig
    from sami_jax.config.training import TrainConfig
    from sami_jax.flops import count_flops
    from sami_jax.huggingface.folder import load_params, read_config
    from sami_jax.model.decoder import make_model, sharded_params
    from sami_jax.scoring.matrices import shardings_of_rows
    from sami_jax.scoring.packed_rows import pack_rows
    from sami_jax.scoring.reference import reference_hidden
    from sami_jax.sharding import make_mesh, put_on_devices
    from sami_jax.stages.score import Scoring, row_limits
    from sami_jax.training import abstract_state, init_state, make_optimizer, make_train_step
    from sami_jax.types import Reference

    mesh, shape = make_mesh(MeshConfig()), read_config(pathlib.Path(folder))
    train = TrainConfig(
        queries_per_step=len(pairs),
        rows_per_device=len(pairs[0].prompt_ids),
        optimizer="rmsprop",
        learning_rate=LEARNING_RATE,
        remat=remat,
        kl_beta=kl_beta,
        weights=dtype,
    )
    model = make_model(shape, mesh=mesh, dtype=dtype, remat=remat)
    packing = pack_rows([pairs], row_limits(model, mesh, Scoring.of(train)))
    batch = put_on_devices(packing.stacked(0), shardings_of_rows(mesh, stacked=True))
    specs = abstract_state(sharded_params(shape, mesh, dtype), make_optimizer(train))
    shardings = jax.tree.map(lambda spec: spec.sharding, specs)
    params = load_params(pathlib.Path(folder), shape, dtype=jnp.dtype(dtype), shardings=shardings.params)
    step_fn, reference, reading = make_train_step(model.rows, train), None, 0.0
    if kl_beta > 0:
        for _ in range(2):  # the first compiles
            started = time.monotonic()
            reference = Reference(reference_hidden(model.rows, params, batch), jnp.copy(model.rows.head(params)))
            jax.block_until_ready(reference)
            reading = time.monotonic() - started
    flops = count_flops(step_fn.jitted(specs), specs, reference, batch), full_flops(shape, pairs)
    states = [put_on_devices(init_state(params, make_optimizer(train)), shardings)]
    del params

    def step() -> float:
        state, metrics = step_fn(states.pop(), reference, batch)
        states.append(jax.block_until_ready(state))
        return float(metrics.loss)

    def matmul(name: str) -> float:
        x, product = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL), name), jax.jit(lambda x: x @ x)
        return _gflops(lambda: product(x).block_until_ready())

    slots = packing.layout.rows * packing.layout.width * packing.depth

    def held() -> tuple[int, int]:
        found = jax.local_devices()[0].memory_stats()
        return found["bytes_in_use"], found["peak_bytes_in_use"]  # since the process began: loading takes less

    return {
        "step": functools.partial(_measured, step, held if DEVICE == "gpu" else _process_held),
        "matmul": matmul,
        "facts": lambda: {"slots": slots, "real": packing.real_share, "flops": flops, "reading": reading},
    }


def _measured(step: Callable[[], float], held: Callable[[], tuple[int, int]]) -> Measured:
    before, _ = held()
    started = time.monotonic()
    loss = step()
    return Measured(loss, time.monotonic() - started, held()[1] - before)


def _process_held() -> tuple[int, int]:
    """Bytes of this process, and the most since this was asked last."""
    found = _status("VmRSS"), _status("VmHWM")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    return found


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
