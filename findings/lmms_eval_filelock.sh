#!/usr/bin/env bash
# lmms-eval: 0.7.3 imports `filelock._api`, which filelock has no more since 4, and it names no bound (filelock comes with torch
# and datasets), so a fresh `pip install lmms-eval` ends every evaluation with "No module named 'filelock._api'".
# Seen with lmms-eval 0.7.3 and filelock 4.3.1. Remedy: pip install "filelock<4".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps lmms-eval==0.7.3 filelock==4.3.1
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import importlib.util

source = importlib.metadata.distribution("lmms-eval").locate_file("lmms_eval/evaluator.py").read_text()
wanted, present = "import filelock._api" in source, importlib.util.find_spec("filelock._api") is not None
declared = [one for one in importlib.metadata.requires("lmms-eval") if one.startswith("filelock")]
print(f"evaluator.py imports filelock._api: {wanted}; filelock has it: {present}; declared: {declared or 'nothing'}")
assert wanted and not present and not declared, "this finding is out of date"
PYTHON
