"""Records `blip2.npz`: what transformers computes for tiny random BLIP-2s with a LLaMA and an Idefics resampler.

Run with `python -m tests.golden.make_blip2` where torch is installed (recorded with transformers 5.23.0, torch 2.13.0).
The tests of the same arrays need no torch; `tests/models/test_minigpt4.py` and `test_connectors.py` also run it live.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.models import blip2, idefics

PATH = Path(__file__).with_name("blip2.npz")
CASES = {name: (blip2, config) for name, config in blip2.CASES.items()} | {"perceiver": (idefics, idefics.CONFIG)}


class Parts(NamedTuple):
    """Of one case: our parameters by name, what goes in by our fields, and what transformers makes of both."""

    params: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


def live(case: str, seed: int = 7) -> Parts:
    """The case drawn from the seed and computed now. Needs torch."""
    theirs, config = CASES[case]
    model, batch = theirs.hf_model(config, seed), theirs.inputs(config, seed=seed + 1)
    params = theirs.to_names(dict(model.named_parameters()), config)
    return Parts(params, batch, theirs.expected(model, batch, config))


def recorded(case: str) -> Parts:
    """The case as `blip2.npz` holds it: of the gradients only the projection's."""
    with np.load(PATH) as arrays:
        params, batch, expected = (
            {name.removeprefix(f"{case}/{group}/"): arrays[name] for name in arrays.files
             if name.startswith(f"{case}/{group}/")} for group in Parts._fields
        )  # fmt: skip
    return Parts({name: blip2.of_levels(levels) for name, levels in params.items()}, batch, expected)


def main() -> None:
    """Writes blip2.npz next to this file."""
    arrays = {}
    for case in CASES:
        params, batch, expected = live(case, seed=0)
        levels = {name: blip2.to_levels(array) for name, array in params.items()}
        for name, array in params.items():
            np.testing.assert_array_equal(blip2.of_levels(levels[name]), array, err_msg=f"{case}: {name}")
        kept = {n: a for n, a in expected.items() if not n.startswith("grad/") or n.startswith("grad/projector/")}
        for group, found in zip(Parts._fields, (levels, batch, kept)):
            arrays |= {f"{case}/{group}/{name}": array for name, array in found.items()}
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
