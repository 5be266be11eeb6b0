#!/usr/bin/env bash
# safetensors.numpy.save_file writes the memory of an array as it lies, and its logical shape beside it: an array that is
# a transposed, Fortran-ordered or stepped view comes back with other values, without an error.
# Seen with safetensors 0.8.0 and numpy 2.4.6. Remedy: numpy.ascontiguousarray before saving.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/a.safetensors" <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

whole = np.arange(12, dtype=np.float32).reshape(3, 4)
views = {"transposed": whole.T, "fortran": np.asfortranarray(whole), "stepped": whole[:, ::2]}
same = {}
for name, view in views.items():
    save_file({name: view}, sys.argv[1])
    back = load_file(sys.argv[1])[name]
    same[name] = back.shape == view.shape and bool((back == view).all())
    print(f"{name}: saved {view.tolist()}, read {back.tolist()}, equal: {same[name]}")
assert not any(same.values()), "safetensors.numpy now saves views as they are: this finding is out of date"
PYTHON
