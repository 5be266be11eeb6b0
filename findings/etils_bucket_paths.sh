#!/usr/bin/env bash
# etils.epath: `absolute()` of a path into a bucket gives a path on the local disk, below the working directory; code that
# makes paths absolute before it hands them on (Orbax wants absolute ones) then writes to the disk without an error.
# Seen with etils 1.15.0 and gcsfs 2026.10.1. Remedy: leave a path with "://" as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'etils[epath-gcs]==1.15.0' gcsfs==2026.10.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from etils import epath

path = epath.Path("gs://bucket/run")
absolute = path.absolute()
print(f"{path!s}: is_absolute {path.is_absolute()}, absolute() {absolute!s}")
assert str(absolute) != str(path), "absolute() keeps a bucket's path: this finding is out of date"
PYTHON
