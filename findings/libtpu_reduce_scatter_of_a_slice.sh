#!/usr/bin/env bash
# libtpu compiles `psum_scatter` over all chips of a square slice (v5e:4x4) to an all-reduce and a slice of its result,
# which sends about twice the bytes of a reduce-scatter. In two stages, over four groups of four chips and then over their
# counterparts, it stays two reduce-scatters. Found by compiling ahead of time, without a TPU; which of both is faster on
# its links was not measured. Who shards gradients over such a slice (FSDP) pays for it in silence.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
cd "$folder"
TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - 2>errors <<'PYTHON' || { cat errors; exit 1; }
import importlib.metadata
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = Mesh(np.array(chips), ("chips",))
FIRST = [[start + 4 * place for place in range(4)] for start in range(4)]
SECOND = [[4 * place + start for start in range(4)] for place in range(4)]


def collectives(stages):
    """How many of each kind the compiled sum over the 16 chips has, of which each keeps a part of the rows."""

    def part(x):
        for groups in stages:
            x = jax.lax.psum_scatter(x, "chips", scatter_dimension=0, axis_index_groups=groups, tiled=True)
        return x

    cut = PartitionSpec(None, "chips")
    summed = jax.shard_map(part, mesh=mesh, in_specs=cut, out_specs=PartitionSpec("chips"), check_vma=False)
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, cut))
    hlo = jax.jit(summed).lower(x).compile().as_text()
    return {kind: len(re.findall(rf"= \S+ {kind}(?:-start)?\(", hlo)) for kind in ("all-reduce", "reduce-scatter")}


one, two = collectives([None]), collectives([FIRST, SECOND])
print(f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}: in one stage {one}, in two {two}")
if one != {"all-reduce": 1, "reduce-scatter": 0} or two != {"all-reduce": 0, "reduce-scatter": 2}:
    sys.exit("this finding is out of date")
PYTHON
