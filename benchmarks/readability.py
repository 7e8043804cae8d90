"""How readable principles were to a base, beside what SAMI gained on them: the learned ones of finished runs.

    sami principles --score --config=configs/miniature.py --out=runs/scores.jsonl
    sami run --config=configs/miniature.py --workdir=runs/miniature
    python benchmarks/readability.py runs/scores.jsonl runs/miniature

Prints a row per principle, the most readable first, with its adherence by iteration, and the rank correlation of score
and gain over all rows. Takes several pairs of scores and run, of other bases for instance.
"""

import pathlib
import sys
from typing import Any

import numpy as np

from sami_jax.files import read_json, read_jsonl


def rows_of(scores: pathlib.Path, workdir: pathlib.Path) -> list[tuple[str, dict[str, Any], list[float]]]:
    """(principle, its score, its adherence by iteration, the base's first) of the learned principles."""
    summaries = sorted(workdir.glob("iter_*/eval/summary.json"))
    adherence = [read_json(path)["splits"]["learned"]["per_principle"] for path in summaries]
    lines = [line for line in read_jsonl(scores) if not line["held_out"]]
    return [(line["name"], line["mi_nats"], [of[line["name"]]["mean"] for of in adherence]) for line in lines]


def ranks(values: list[float]) -> np.ndarray:
    """Mean ranks: equal values share theirs."""
    array = np.array(values)
    return np.array([np.mean(np.flatnonzero(np.sort(array) == value)) for value in array])


def main() -> None:
    """Prints the table."""
    paths = [pathlib.Path(argument) for argument in sys.argv[1:]]
    if not paths or len(paths) % 2:
        sys.exit(__doc__)
    print("| run | principle | MI under the base, nats | adherence by iteration |\n|---|---|---|---|")
    scored: list[float] = []
    gains: list[list[float]] = []
    for scores, workdir in zip(paths[::2], paths[1::2], strict=True):
        for name, mi, adherence in rows_of(scores, workdir):
            interval = f"{mi['mean']:.4f} [{mi['low']:.4f}, {mi['high']:.4f}]"
            print(f"| {workdir.name} | {name} | {interval} | {', '.join(f'{value:.3f}' for value in adherence)} |")
            scored.append(mi["mean"])
            gains.append([after - adherence[0] for after in adherence[1:]])
    print(f"\nrank correlation of score and gain over {len(scored)} principles, by iteration:")
    for iteration, gained in enumerate(zip(*gains, strict=True), start=1):
        print(f"  {iteration}: {np.corrcoef(ranks(scored), ranks(list(gained)))[0, 1]:+.2f}")


if __name__ == "__main__":
    main()
