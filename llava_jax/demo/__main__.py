"""`python -m llava_jax.demo [--family minigpt4 | anyres] [--quick] [--workdir DIR]` and `... demo bases [DIR]`.

The first runs LLaVA, MiniGPT-4, or LLaVA-1.6 with its tiles, in miniature: a synthetic world, base models that know it
from text alone, the two stages of training and ablations of them, a test set of held-out pictures, and an export for
transformers. It prints a table and writes DIR/demo.json and DIR/report.html. The second trains the base models again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_jax import cli, heap
from llava_jax.errors import UsageError

# Of story.FAMILIES. jax, and the modules that import it, are imported after parsing, so that a usage error is quick.
FAMILIES = ("llava", "minigpt4", "anyres")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return cli.run("demo", lambda: _bases(args[1:]) if args[:1] == ["bases"] else _demo(args))
    except SystemExit as stop:  # --help, or a usage error that is printed
        return int(stop.code or 0)


def _demo(args: list[str]) -> int:
    parser = cli.Parser("python -m llava_jax.demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    family = parser.add_mutually_exclusive_group()
    family.add_argument("--family", choices=FAMILIES, default="llava", help="default: llava")
    family.add_argument("--quick", dest="family", action="store_const", const="quick",
                        help="llava with fewer records and steps, and one ablation")
    workdir_help = "a new directory (default: runs/demo, or runs/demo_FAMILY)"
    parser.add_argument("--workdir", type=cli.on_disk, help=workdir_help)
    parser.add_argument("--seed", type=int, default=0, help="of the world, the projector and the order of the data")
    options = parser.parse_args(args)
    default = "runs/demo" if options.family == "llava" else f"runs/demo_{options.family}"
    workdir = Path(options.workdir or default)
    _check(workdir, options.seed)
    if workdir.exists() and any(workdir.iterdir()):
        raise UsageError(f"--workdir {workdir} is not empty: name a new directory, or delete it to run the demo again")
    from llava_jax import compilations
    from llava_jax.demo import report, story

    cli.show_progress()
    compilations.keep()
    outcome = story.run_family(workdir, options.seed, story.FAMILIES[options.family])
    (workdir / "demo.json").write_text(json.dumps(report.numbers(outcome), indent=1) + "\n")
    (workdir / "report.html").write_text(report.page(outcome, workdir / story.WORLD))
    print(report.table(outcome))
    name, turns = outcome.chat
    picture = workdir / story.WORLD / name
    print(f"\nA conversation with stage 2 about {picture}:")
    print("\n".join(f"  {role}: {text}" for role, text in turns))
    print(f"\nIn {outcome.secs:.0f} s. Open {workdir}/report.html, or continue the conversation:\n"
          f"  python -m llava_jax.chat --checkpoint {workdir}/stage2 --image {picture}")
    return 0


def _bases(args: list[str]) -> int:
    text = "trains the demo's base models, about an hour on two busy cores; see demo/bases.py"
    parser = cli.Parser("python -m llava_jax.demo bases", description=text)
    parser.add_argument("directory", nargs="?", type=cli.on_disk, help="default: the package's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    directory = options.directory or Path(__file__).parent / "assets"
    _check(directory, options.seed)
    from llava_jax import compilations
    from llava_jax.demo import bases

    cli.show_progress()
    compilations.keep()
    bases.train(directory, options.seed)
    return 0


def _check(directory: Path, seed: int) -> None:
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file: name a directory")
    if seed < 0:
        raise UsageError(f"--seed {seed}: want 0 or more")


if __name__ == "__main__":
    heap.keep()
    sys.exit(main())
