"""What two processes with one device each do with the checkpoints of a directory: `python -m tests.checkpoint.two`."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax import distributed, sharding
from llava_jax.checkpoint import manager, reader, sharded, tensors
from llava_jax.checkpoint.manager import Saved
from llava_jax.errors import Unreachable, UnusableCheckpoint
from llava_jax.train import init

SHAPE = (2, 64, 32)


def main(folder: Path) -> None:
    distributed.join()
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1, "context": 1})
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    values = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)

    def array(number: float) -> jax.Array:
        return jax.make_array_from_callback(SHAPE, cut, lambda index: values[index] + number)

    struct = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=cut)
    for name, act in (("damaged", _damaged), ("flipped", _flipped), ("unreachable", _unreachable)):
        checkpoints = manager.open_checkpoints(folder / name, 2)
        for step in (1, 2):
            manager.save(checkpoints, Saved(step, {"w": array(step)}, {"m": array(0)}, {"step": step}))
            manager.wait(checkpoints)
        real = sharded.load
        act(folder / name)
        distributed.exchange("the fault is planted", True)
        try:
            saved = manager.restore(checkpoints, {"w": struct}, {"m": struct})
            mine = [shard.data for shard in saved.params["w"].addressable_shards]
            right = all(np.array_equal(x, values[s.index] + saved.step)
                        for x, s in zip(mine, saved.params["w"].addressable_shards))  # fmt: skip
            print(f"{name}: step {saved.step}, right: {right}", flush=True)
        except (Unreachable, UnusableCheckpoint) as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        sharded.load = real
        manager.close(checkpoints)
    _base(folder / "base", struct, values)


def _damaged(folder: Path) -> None:
    """Process 1 alone finds damage in the first step that it reads."""
    _fail_once(UnusableCheckpoint("planted damage"))


def _unreachable(folder: Path) -> None:
    _fail_once(Unreachable("gs://planted: no answer"))


def _fail_once(error: Exception) -> None:
    real, faults = sharded.load, [error] if distributed.index() == 1 else []

    def load(*arguments: object) -> object:
        if faults:
            raise faults.pop()
        return real(*arguments)

    sharded.load = load


def _flipped(folder: Path) -> None:
    """A value changes in the half that process 1 reads, and its file stays readable."""
    if distributed.index() == 0:
        opened = reader.own_tensors(folder, 2)
        spec = opened.store("w").spec().to_json() | {"open": True}
        writable = tensors.tensorstore.open(spec, write=True, read=True).result()
        writable[1, 63, 31].write(np.float32(-1)).result()


def _base(folder: Path, struct: object, values: np.ndarray) -> None:
    """A checkpoint of `TensorWriter` is read by halves; with a value changed in one of them by neither."""
    if distributed.index() == 0:
        with reader.TensorWriter(folder / "0" / "params") as writer:
            writer.write("llm/w", values)
    distributed.exchange("the base is written", True)
    read = init.read(folder, {"llm/w": struct})["llm"]["w"]
    right = all(np.array_equal(shard.data, values[shard.index]) for shard in read.addressable_shards)
    print(f"base: right: {right}", flush=True)
    distributed.exchange("the base is read", True)
    if distributed.index() == 0:
        array = next(path for path in (folder / "0" / "params" / "llm.w").iterdir() if path.name != ".zarray")
        data = bytearray(array.read_bytes())
        data[-1] ^= 1
        array.write_bytes(data)
    distributed.exchange("the base is damaged", True)
    try:
        init.read(folder, {"llm/w": struct})
    except UnusableCheckpoint as error:
        print(f"base: {error}", flush=True)


if __name__ == "__main__":
    os.environ["LLAVA_JAX_MULTIHOST"] = "1"
    main(Path(sys.argv[1]))
