"""What packed rows cost beyond the least that the same queries can cost, in FLOPs counted from the jaxpr of a step.

    pip install -e ".[train]"
    python benchmarks/layout_flops.py                 # a 7B, 128 queries a step, 8 devices with a row each; a minute

Nothing is run, and no device is needed. For each C, on lengths like those of TL;DR:

- layers, head: FLOPs of all matmuls but attention's, over those of the same program if every slot held a token of a
  query and every place for a label a label. What is above 1 is padding. *both* is held to at most 1.10.
- attention: its FLOPs over those of the pairs of tokens that see each other, by back-end: tokamax's kernel (TPU),
  blocks of queries (CPU), one mask over the row (GPU). Its share of the step's FLOPs is that of the kernel.
- full sequences: FLOPs of the authors' layout (every cell a sequence, padded to its query's longest, the head at every
  position, nothing computed twice) over those of ours, its kernel and what it computes again included.

Exits with 1 where padding costs more than 1.10.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lengths import draw_pairs, full_flops

from sami_jax.config.mesh import MeshConfig
from sami_jax.config.training import TrainConfig
from sami_jax.data.pairs import Pair
from sami_jax.flops import count_flops
from sami_jax.huggingface.folder import read_config
from sami_jax.model.attention import BLOCKED, DENSE, BackEnd
from sami_jax.model.attention_tpu import visited_blocks
from sami_jax.model.decoder import make_model, sharded_params
from sami_jax.model.shape import DecoderConfig
from sami_jax.scoring.packed_rows import Packing, RowLimits, pack_rows
from sami_jax.sharding import make_mesh
from sami_jax.training import abstract_state, make_optimizer, make_train_step
from sami_jax.types import Remat

MODELS = pathlib.Path(__file__).resolve().parent.parent / "configs" / "models"
MOST = 1.10


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one step: executed by layers and head, without attention, and the parts that padding takes no share in."""

    layers: int
    head: int
    least_layers: float
    least_head: float
    attention: dict[str, float]
    least_attention: float
    full_sequences: float

    @property
    def total(self) -> float:
        return self.layers + self.head + self.attention["kernel"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mistralai/Mistral-7B-v0.1", help="one of configs/models")
    parser.add_argument("--queries", type=int, default=128, help="in a step (default: 128)")
    parser.add_argument("--devices", type=int, default=8, help="that share the rows (default: 8)")
    parser.add_argument("--rows_per_device", type=int, default=1, help="(default: 1)")
    parser.add_argument("--max_row_tokens", type=int, default=4096, help="(default: 4096)")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="full", help="(default: full)")
    arguments = parser.parse_args()
    shape = read_config(MODELS / arguments.model)
    print(
        " C  rows x width  real     layers   head   both     attention: kernel blocks   mask  share     full sequences"
    )
    worst = 0.0
    for constitutions in (2, 4, 8):
        pairs = draw_pairs(arguments.queries, constitutions, vocab=shape.vocab_size)
        limits = RowLimits(arguments.devices, arguments.rows_per_device, arguments.max_row_tokens, 256, math.inf)
        packing = pack_rows([pairs], limits)
        found = count(shape, packing, arguments.remat)
        both = (found.layers + found.head) / (found.least_layers + found.least_head)
        worst = max(worst, both)
        attention = [f"{flops / found.least_attention:6.2f}" for flops in found.attention.values()]
        print(
            f"{constitutions:2}  {packing.layout.rows:4} x {packing.layout.width:4}   {packing.real_share:.3f}    "
            f"{found.layers / found.least_layers:.3f}  {found.head / found.least_head:.3f}  {both:.3f}            "
            f"{' '.join(attention)}   {found.attention['kernel'] / found.total:.2f}  "
            f"{found.full_sequences / found.total:12.2f}x",
            flush=True,
        )
    print(f"padding costs at most {worst:.3f} times the least: {'at' if worst <= MOST else 'ABOVE'} most {MOST:.2f}")
    return 0 if worst <= MOST else 1


def count(shape: DecoderConfig, packing: Packing, remat: Remat) -> Flops:
    """FLOPs of one optimizer step of the packing's first group."""
    layout, pairs = packing.layout, packing.groups[0]
    train = TrainConfig(queries_per_step=len(pairs), optimizer="rmsprop", remat=remat)
    mesh, batch = make_mesh(MeshConfig()), packing.stacked(0)
    model = make_model(shape, remat=remat, mesh=mesh, dtype="bfloat16")
    state = abstract_state(sharded_params(shape, mesh, "float32"), make_optimizer(train))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    executed = count_flops(make_train_step(model.rows, train).jitted(state), state, None, abstract, platform="tpu")
    layers = packing.depth * shape.n_layers
    executed -= layers * attention_flops(shape, model.attention, layout.rows, layout.width, remat)
    label_slots = packing.depth * layout.shards * layout.labels
    head = 2 * 4 * label_slots * shape.embed_dim * shape.vocab_size  # forward, again, and two gradients
    labels = int(batch.counts.sum())
    real = sum(len(p) - 1 for one in pairs for p in one.prompt_ids) + labels
    slots = packing.depth * layout.rows * layout.width
    ends = np.asarray(batch.rows.ends).reshape(-1, layout.width)
    block = next(block for block in (512, 256, 128) if layout.width % block == 0)
    scores = float(visited_blocks(ends, block).sum()) * block**2
    a_pass = 2 * 2 * shape.n_layers * shape.n_heads * shape.head_dim  # for a query and a key: score, and mix
    again = remat != "none"
    attention = {
        "kernel": a_pass * scores * (1 + again + 2.5),  # its backward computes the scores again
        "blocks": layers * attention_flops(shape, BLOCKED, layout.rows, layout.width, remat),
        "mask": layers * attention_flops(shape, DENSE, layout.rows, layout.width, remat),
    }
    return Flops(
        layers=executed - head,
        head=head,
        least_layers=(executed - head) * real / slots,
        least_head=head * labels / label_slots,
        attention=attention,
        least_attention=a_pass * sum(map(visible_pairs, pairs)) * (1 + again + 2),
        full_sequences=full_flops(shape, pairs),
    )


def visible_pairs(pair: Pair) -> int:
    """Queries and keys of all packs of a query that see each other."""
    total = 0
    for prompt in pair.prompt_ids:
        shared = len(prompt) - 1
        total += shared * (shared + 1) // 2
        total += sum(len(ids) * shared + len(ids) * (len(ids) + 1) // 2 for ids in pair.response_ids)
    return total


def attention_flops(shape: DecoderConfig, one: BackEnd, rows: int, width: int, remat: Remat) -> int:
    """Of one layer's attention, forward and backward, and forward again where it is computed again."""

    def out(queries: Any, keys: Any, values: Any, ends: Any) -> Any:
        return one.attend(queries, keys, values, one.prepare(ends, ends, None))

    def total(*args: Any) -> Any:
        return jnp.sum(out(*args).astype(jnp.float32))

    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    args = [jax.ShapeDtypeStruct((rows, width, n, shape.head_dim), jnp.bfloat16) for n in heads]
    ends = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    again = count_flops(out, *args, ends) if remat != "none" else 0
    return count_flops(jax.grad(total, argnums=(0, 1, 2)), *args, ends) + again


if __name__ == "__main__":
    sys.exit(main())
