#!/usr/bin/env bash
# jax's persistent compilation cache is written by process 0 alone. On a job of several hosts whose cache lies on each
# host's own disk, all hosts but the first compile everything again at every start, and nothing says so (but for a
# debug line of jax._src.compiler). Seen with jax 0.10.2, two CPU processes. Remedy: a cache directory that all hosts share
# (JAX_COMPILATION_CACHE_DIR may be a gs:// path).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cat >"$folder/job.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

number, port, cache = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
array = jax.make_array_from_callback((4,), whole, lambda index: jnp.arange(4.0)[index])
print(float(jax.jit(lambda x: (x * 3).sum())(array)))
PYTHON
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
for number in 0 1; do
    mkdir "$folder/cache$number"
    JAX_PLATFORMS=cpu timeout 120 "$folder/venv/bin/python" "$folder/job.py" "$number" "$port" "$folder/cache$number" \
        >"$folder/out$number" 2>&1 &
    jobs[number]=$!
done
for number in 0 1; do wait "${jobs[number]}" || { cat "$folder/out$number"; exit 1; }; done
first=$(find "$folder/cache0" -type f | wc -l)
second=$(find "$folder/cache1" -type f | wc -l)
echo "files in the cache of process 0: $first, of process 1: $second"
[ "$first" -gt 0 ] && [ "$second" -eq 0 ] || { echo "other processes write their cache now: out of date" >&2; exit 1; }
