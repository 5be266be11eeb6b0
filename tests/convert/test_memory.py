"""Streaming: a whole model goes out and in with one stacked leaf in memory, not with the model."""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import exporting, importing
from llava_jax.models.llava import abstract_params
from llava_jax.models.presets import config_to_json, get
from llava_jax.prompt import tokenizer
from tests.convert import tiny


def peak_of(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_export_and_import_hold_one_stacked_leaf_and_one_tensor(tmp_path):
    small = get("tiny")
    llm = dataclasses.replace(small.llm, width=384, mlp_width=768, layers=8, heads=4, kv_heads=4, head_width=96)
    config = dataclasses.replace(small, llm=llm)
    specs = params.flatten(abstract_params(config))
    with reader.TensorWriter(tmp_path / "ours" / "0" / "params") as writer:
        for name, spec in specs.items():
            writer.write(name, np.ones(spec.shape, np.float32))
    prompt = model_json.PromptMetadata("v1", False, "pad", False)
    words = tokenizer.load(tiny.TOKENIZER, legacy=False).files()
    model_json.write(tmp_path / "ours", model_json.Metadata(config_to_json(config), prompt), words)
    sizes = {name: 4 * math.prod(spec.shape) for name, spec in specs.items()}
    leaf, theirs = sizes["llm/blocks/gate/kernel"], 384 * 1024 * 4  # a stack; the vocabulary's 1,024 rows
    assert leaf == max(sizes.values()) and sum(sizes.values()) > 5 * leaf
    out = peak_of(lambda: exporting.export("hf", tmp_path / "ours", tmp_path / "out"))
    back = peak_of(lambda: importing.import_checkpoint(tmp_path / "out", tmp_path / "again"))
    slack = 2 * 2**20  # tracing the model for its names, tokenizer.json
    pytest.importorskip("gguf")
    q8 = peak_of(lambda: exporting.export("gguf", tmp_path / "ours", tmp_path / "gguf", dtype="q8_0"))
    assert q8 < leaf + 3 * theirs + slack, f"gguf {q8} bytes, largest leaf {leaf}"  # a tensor, and what it becomes
    assert max(out, back) < leaf + 2 * theirs + slack, f"export {out}, import {back} bytes, largest leaf {leaf}"
