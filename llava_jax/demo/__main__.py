"""The doors `python -m llava_jax.demo [--family minigpt4] [--workdir DIR]` and `python -m llava_jax.demo bases [DIR]`.

The first tells LLaVA's story, or MiniGPT-4's, in miniature: a drawn world, base models that can talk about it but not
see, the two stages of training and what is lost without them, an exam on pictures never seen, and an export for
transformers. It ends with a table and writes DIR/demo.json and DIR/report.html. The second trains the base models anew.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_jax import cli
from llava_jax.demo import bases, report, story
from llava_jax.demo.bases import Failed
from llava_jax.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a door; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return cli.run("demo", lambda: _bases(words[1:]) if words[:1] == ["bases"] else _demo(words))
    except Failed as error:
        return error.args[0]


def _demo(words: list[str]) -> int:
    parser = cli.Parser("python -m llava_jax.demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", choices=sorted(story.FAMILIES), default="llava", help="default: llava")
    parser.add_argument("--workdir", help="a new directory (default: runs/demo, or runs/demo_minigpt4)")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the projector and the order of the data")
    told = parser.parse_args(words)
    usual = "runs/demo" if told.family == "llava" else f"runs/demo_{told.family}"
    workdir, family = Path(told.workdir or usual), story.FAMILIES[told.family]
    _check(workdir, told.seed)
    if workdir.exists() and any(workdir.iterdir()):
        raise UsageError(f"--workdir {workdir} is not empty: name a new directory, or delete it to run the demo again")
    outcome = story.tell(workdir, told.seed, family)
    (workdir / "demo.json").write_text(json.dumps(report.numbers(outcome), indent=1) + "\n")
    (workdir / "report.html").write_text(report.page(outcome, workdir / story.WORLD))
    print(report.table(outcome))
    name, said = outcome.chat
    picture = workdir / story.WORLD / name
    print(f"\nA talk with stage 2 about {picture}:")
    print("\n".join(f"  {role}: {text}" for role, text in said))
    print(f"\nIn {outcome.secs:.0f} s. Open {workdir}/report.html, or go on talking:\n"
          f"  python -m llava_jax.chat --checkpoint {workdir}/stage2 --image {picture}")
    return 0


def _bases(words: list[str]) -> int:
    parser = cli.Parser("python -m llava_jax.demo bases", description=bases.__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=bases.ASSETS, help="default: the package's own")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args(words)
    _check(told.directory, told.seed)
    bases.train(told.directory, told.seed)
    return 0


def _check(directory: Path, seed: int) -> None:
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file: name a directory")
    if seed < 0:
        raise UsageError(f"--seed {seed}: want 0 or more")


if __name__ == "__main__":
    sys.exit(main())
