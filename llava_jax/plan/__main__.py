"""Memory, FLOPs, time and cost of a training run, without a TPU or a GPU.

    python -m llava_jax.plan --config configs/X.py --topology v5e:4x4 [--config.data.rows_per_chip=4 ...]

It compiles the step that `train` would run: abstract arrays, the TPU's own compiler, or XLA's for GPUs (H100:8).
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from llava_jax import chips, cli, files
from llava_jax import config as configs
from llava_jax.errors import UsageError

# jax, and the modules that import it, are imported by the functions that need them, so that a usage error is quick.


def main(argv: Sequence[str] | None = None) -> int:
    """Plans; the exit code: 0 done (also where it does not fit), 64 what cannot be asked."""
    return cli.run("error", lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    args, overrides = cli.overrides(argv)
    options = _parser().parse_args(args)
    if options.topologies:
        print("\n".join(_topologies()))
        return 0
    return _search(options, overrides) if options.search else _plan(options, overrides)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m llava_jax.plan", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--config", metavar="FILE", help="the experiment; any of its scalars is set by --config.BRANCH.KEY=VALUE")
    add("--topology", metavar="CHIP:SHAPE", help="the TPU slice, as v5e:4x4, or the GPUs of a machine, as H100:8")
    add("--slices", type=int, metavar="N", help="number of slices, joined by the data centre's network")
    add("--json", metavar="FILE", help="write the numbers there too")
    add("--price", type=float, metavar="USD", help="of one chip and hour")
    add("--samples", type=int, metavar="N", help="samples of the whole run, where the data is not on this machine")
    add("--sample-tokens", type=int, metavar="N", help="mean tokens of a sample, its picture's included")
    add("--search", action="store_true", help="try rows x rematerialisation x mesh; print the fastest that fits")
    add("--topologies", action="store_true", help="list what --topology takes")
    return parser


def _plan(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    config = _config(options, overrides)
    from llava_jax.plan import report
    from llava_jax.plan.compile import build, compile_config, find_target, model_of

    _leave_accelerators()
    model = model_of(config)
    target = find_target(config.mesh, options.topology)
    program = build(config, target)
    workload = report.workload_of(config, model, program, options.sample_tokens)
    costs = report.Costs(_samples(config, options, workload.samples), options.price)
    compiled = compile_config(config, target, program, workload.chunks, workload.tile_shares)
    print(report.page(compiled, workload, costs), flush=True)
    if options.json:
        _write(options.json, report.numbers(compiled, workload, costs))
    return 0


def _search(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    config = _config(options, overrides)
    from llava_jax.plan import report, search

    _leave_accelerators()
    best = search.search(options.config, overrides, options.topology, options.sample_tokens)
    if best is None:
        print("nothing that was tried fits; more chips, frozen_dtype=int8 or adapters (lora) need less memory")
        return 0
    costs = report.Costs(_samples(config, options, best.workload.samples), options.price)
    print("\n".join(["", report.page(best.compiled, best.workload, costs), "", "run it with:",
                     _command(options.config, overrides | best.overrides)]))  # fmt: skip
    if options.json:
        _write(options.json, report.numbers(best.compiled, best.workload, costs) | {"overrides": best.overrides})
    return 0


def _config(options: argparse.Namespace, overrides: dict[str, str]) -> configs.Config:
    for name in ("config", "topology"):
        if not vars(options)[name]:
            raise UsageError(f"--{name} is missing; see --help, and --topologies for the list")
    chips.of_topology(options.topology)
    if options.slices is not None:
        overrides["mesh.slices"] = str(options.slices)
    config = configs.load(options.config, overrides)
    _check_template(config)
    return config


def _check_template(config: configs.Config) -> None:
    """Refuses a template that the tokenizer cannot write, where that is on this machine."""
    from llava_jax.checkpoint import model_json
    from llava_jax.prompt import ending, templates, tokenizer

    prompt, base = config.prompt, config.model.base
    template = templates.get(prompt.template)
    tokenizer_path = prompt.tokenizer or (f"{base}/{model_json.TOKENIZER}" if base else "")
    if tokenizer_path and files.exists(tokenizer_path):
        ending.check(template, tokenizer.load(tokenizer_path, prompt.legacy), tokenizer_path, prompt.image_start_end)


def _samples(config: configs.Config, options: argparse.Namespace, step_samples: float) -> int | None:
    """Samples of the whole run: by --samples, by the steps, or counted where the data is here; None: unknown."""
    from llava_jax.data.sources import open_source

    epochs = config.train.epochs or 1
    if options.samples is not None:
        return options.samples
    if config.train.steps:
        return round(config.train.steps * step_samples)
    if not config.data.sources or not all(files.exists(source.path) for source in config.data.sources):
        return None
    return round(epochs * sum(len(open_source(s.path, None, s.name)) * s.weight for s in config.data.sources))


def _command(config: str, overrides: dict[str, str]) -> str:
    settings = [f"--config.{key}={value}" for key, value in overrides.items()]
    return " ".join(["python -m llava_jax.train", f"--config {config}", "--workdir DIR", *settings])


def _write(path: str, numbers: dict[str, Any]) -> None:
    files.write_whole(path, (json.dumps(numbers, indent=1) + "\n").encode())


def _leave_accelerators() -> None:
    """A plan on a machine with TPUs or GPUs must not take them."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _topologies() -> list[str]:
    from llava_jax.plan import report

    rows = list[list[str]]()
    for chip in chips.CHIPS:
        memory, peak = (chip.devices_per_chip * value for value in (chip.hbm_bytes, chip.peak_flops))
        for name in (f"{chip.name}:{shape}" for shape in chip.shapes):
            count = math.prod(chips.dimensions(name))
            rows.append([name, str(count), str(chips.hosts(name)), f"{memory / chips.GIB:.2f}", f"{peak / 1e12:.0f}"])
    return report.table(["topology", "chips", "hosts", "GiB a chip", "TFLOP/s a chip"], rows)


if __name__ == "__main__":
    sys.exit(main())
