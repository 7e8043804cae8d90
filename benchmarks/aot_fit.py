"""Do the paper's models fit: their programs compiled ahead of time by the real TPU compiler, no TPU needed.

    pip install -e ".[train,tpu]"        # Linux x86-64
    python benchmarks/aot_fit.py         # all three, about ten minutes on two cores
    python benchmarks/aot_fit.py --only=mistral-7b

A full optimizer step of 128 queries x 2 constitutions x 2 responses in packed rows; prefill and decode of 64 queries
x 2 constitutions. Prints the peak memory of a chip against the chip's own, the compile time, and FLOPs counted
from the jaxpr. Exits with 1 where one does not fit. No TPU ran: nothing here is a speed.
"""

import argparse
import pathlib
import sys

from sami_jax.config.run import load_config
from sami_jax.errors import SamiError, exit_code
from sami_jax.huggingface.folder import read_config
from sami_jax.plan import GIB, HBM_GIB, compile_programs, topology_devices

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
SLICES = {
    "mistral-7b": ("mistral_7b.py", "v5e:4x4"),
    "mixtral-8x7b": ("mixtral_8x7b.py", "v5p:2x2x4"),
    "llama3-70b": ("llama3_70b.py", "v5p:4x4x4"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SLICES, help="one model instead of all")
    parser.add_argument("--prompt_tokens", type=int, default=672, help="longest prompt (default: 672)")
    parser.add_argument("--response_tokens", type=int, default=352, help="longest response (default: 352)")
    arguments = parser.parse_args()
    fits = True
    print("model         slice       program       peak GiB   of  compile s   TFLOP")
    for model in [arguments.only] if arguments.only else SLICES:
        file, topology = SLICES[model]
        config = load_config(str(CONFIGS / file))
        devices = topology_devices(topology)
        hbm = HBM_GIB[devices[0].device_kind]
        programs = compile_programs(
            config,
            read_config(CONFIGS / "models" / config.model),
            devices,
            prompt_tokens=arguments.prompt_tokens,
            response_tokens=arguments.response_tokens,
        )
        for program in programs:
            peak = "no" if program.peak_bytes is None else f"{program.peak_bytes / GIB:.2f}"
            fits &= program.peak_bytes is not None
            print(
                f"{model:13} {topology:11} {program.name:12} {peak:>9} {hbm:>4} {program.compile_s:>10.0f} "
                f"{program.flops / 1e12:>7.0f}",
                flush=True,
            )
            if program.refusal:
                print(f"  {program.refusal}", flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SamiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
