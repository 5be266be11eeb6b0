#!/usr/bin/env bash
# XLA on a CPU computes a product of bfloat16 with float32 sums and grouped heads, "bkgts,bksh->bkgth", and refuses it
# where the result's dimensions have another order, "bkgts,bksh->btkgh" (as attention writes it): "Unsupported element
# type for DotThunk::Execute: BF16 x BF16 = F32". It is raised when the program runs, not when it is compiled;
# float32 has both. Seen with jax 0.10.2 and 0.12.0.1. Remedy: the order of the factors, and jnp.moveaxis behind it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp


def result(letters, dtype):
    a, b = jnp.ones((2, 4, 2, 5, 64), dtype), jnp.ones((2, 4, 64, 8), dtype)
    product = jax.jit(lambda a, b: jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)).lower(a, b).compile()
    try:
        return float(product(a, b).sum())
    except jax.errors.JaxRuntimeError as error:
        return "refused" if "Unsupported element type" in str(error) else str(error)


found = {(letters, dtype): result(letters, dtype)
         for letters in ("bkgts,bksh->bkgth", "bkgts,bksh->btkgh") for dtype in ("bfloat16", "float32")}
for what, value in found.items():
    print(jax.__version__, *what, value)
if list(found.values()) != [40960.0, 40960.0, "refused", 40960.0]:
    raise SystemExit("this changed: out of date")
PYTHON
