"""Every verb of convert with all of its paths in a bucket does what it does on a disk, to the byte."""

import json
import re

import numpy as np
import pytest

from llava_jax import files
from llava_jax.checkpoint import reader
from llava_jax.convert import torch_zip
from llava_jax.convert.__main__ import main
from llava_jax.convert.files import Spec, open_tensors, write_shards
from llava_jax.errors import MissingWeights, UnusableCheckpoint
from tests import buckets
from tests.convert import adapters, tiny

COMMITTED = "commit_success.txt"  # a bucket's alone


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Files of others: a whole LLaVA, its parts as torch files, an adapter."""
    folder = tmp_path_factory.mktemp("sources")
    tiny.write_hub(folder / "hub", tiny.hub_tensors())
    original = tiny.renamed(tiny.hub_tensors(3), "original")
    tiny.write_original(folder / "original", original, shards=2, binary=True)
    tiny.write_clip(folder / "clip")
    tiny.write_llama(folder / "llama", binary=True)
    projector = {name: tensor for name, tensor in original.items() if "mm_projector" in name}
    torch_zip.write_torch(folder / "mm_projector.bin", projector)
    adapters.write_peft(folder / "adapter", adapters.tensors(adapters.NEW))
    return folder


def convert(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def test_every_verb_writes_the_same_in_a_bucket_as_on_a_disk(sources, tmp_path, bucket, capsys):
    roots = tmp_path / "disk", bucket
    files.make_directory(roots[0])
    for path in sources.rglob("*"):
        if path.is_file():
            files.write_whole(roots[0] / path.relative_to(sources), path.read_bytes())
    buckets.upload(sources, bucket)
    printed = []
    for root in map(str, roots):
        lines = convert(capsys, "import", f"{root}/hub", f"{root}/ours")
        lines += convert(capsys, "import", f"{root}/original", f"{root}/theirs", "--vision", f"{root}/clip")
        lines += convert(capsys, "assemble", f"{root}/new", "--vision", f"{root}/clip", "--llm", f"{root}/llama",
                         "--projector", f"{root}/mm_projector.bin")  # fmt: skip
        lines += convert(capsys, "import", f"{root}/adapter", f"{root}/lora", "--base", f"{root}/ours")
        lines += convert(capsys, "export", "--format", "peft", f"{root}/lora", f"{root}/out/peft")
        lines += convert(capsys, "export", "--format", "peft", "--split-projector", f"{root}/lora", f"{root}/out/split")
        lines += convert(capsys, "export", "--format", "hf", f"{root}/ours", f"{root}/out/hf")
        lines += convert(capsys, "export", "--format", "llava", f"{root}/theirs", f"{root}/out/llava-tiny")
        lines += convert(capsys, "export", "--format", "projector", f"{root}/new", f"{root}/out/projector")
        lines += convert(capsys, "merge", f"{root}/lora", f"{root}/whole")
        lines += convert(capsys, "inspect", f"{root}/lora") + convert(capsys, "verify", f"{root}/whole")
        printed.append(lines.replace(root, "ROOT"))
    assert printed[0] == printed[1]
    disk, there = (buckets.contents(root) for root in roots)
    there = {name: content for name, content in there.items() if not name.endswith(COMMITTED)}
    assert sorted(disk) == sorted(there)
    # A checksum in model.json covers the paths in it.
    disk, there = ({name: re.sub(rb'"checksum": "[0-9a-f]+"', b"", content) for name, content in found.items()}
                   for found in (disk, there))  # fmt: skip
    assert [name for name in disk if disk[name] != there[name]] == []
    assert len(disk) > 400 and "out/llava-tiny/vision_tower/model.safetensors" in disk
    adapter = json.loads(there["out/split/adapter/adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "ROOT/out/split/base"


def test_weights_of_a_bucket_are_read_tensor_by_tensor(bucket, bucket_proxy):
    tensors = {f"t{i}": np.full((50, 40), i, np.float32) for i in range(4)}
    specs = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_shards(f"{bucket}/sharded", specs, iter(tensors.items()), shard_bytes=16_000)
    torch_zip.write_torch(f"{bucket}/weights.bin", tensors)
    with buckets.faults(bucket_proxy, lambda method, path: None):
        for place in (f"{bucket}/sharded", f"{bucket}/weights.bin"):
            opened = open_tensors(place)
            bucket_proxy.requests.clear()
            np.testing.assert_array_equal(opened.read("t2"), tensors["t2"])
            ranges = [one.sent_bytes for one in bucket_proxy.requests]
            assert len(ranges) <= 1 and sum(ranges) <= 33_000, ranges  # 8,000 bytes; a small zip is one block


def test_damaged_weights_of_a_bucket_are_refused_as_on_a_disk(sources, bucket):
    whole = (sources / "hub" / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    contents = [whole[:-100], whole + b"0", whole[:4], b"", (2**62).to_bytes(8, "little") + b"{" + whole[9:],
                whole[:20] + b"\xff" + whole[21:], whole[: 8 + size]]  # fmt: skip
    for content in contents:
        files.write_whole(f"{bucket}/x/model.safetensors", content)
        with pytest.raises(UnusableCheckpoint, match="x/model.safetensors: (no whole safetensors|neither safetensors)"):
            open_tensors(f"{bucket}/x")
    with pytest.raises(MissingWeights, match="no weights here"):
        open_tensors(f"{bucket}/nothing")


def test_what_is_in_a_bucket_already_is_not_overwritten(sources, bucket, capsys):
    hub = sources / "hub"
    assert main(["import", str(hub), f"{bucket}/ours"]) == 0
    assert main(["import", str(hub), f"{bucket}/ours"]) == 64
    assert "exists already and is not overwritten" in capsys.readouterr().err
    assert reader.steps(f"{bucket}/ours") == [0]
    assert main(["import", f"{bucket}/gone", f"{bucket}/new"]) == 66
    assert f"{bucket}/gone/config.json is missing" in capsys.readouterr().err and not files.listed(f"{bucket}/new")
