"""A checkpoint of ours, opened to be read tensor by tensor: as it lies on the disk, or with its adapters merged."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from llava_jax import params
from llava_jax.checkpoint import model_json, reader
from llava_jax.checkpoint.tensors import Tensors
from llava_jax.errors import UsageError
from llava_jax.models import lora
from llava_jax.models.llava import abstract_params
from llava_jax.models.presets import LlavaConfig, config_from_json
from llava_jax.prompt import tokenizer


class Source(NamedTuple):
    """An opened checkpoint: its metadata, config, tokenizer, and where each parameter lies with its shape and dtype.

    Attributes:
      specs: the parameters that it shows.
      merged: kernels that are read with their adapters added.
    """

    directory: epath.Path
    metadata: model_json.Metadata
    config: LlavaConfig
    words: tokenizer.Tokenizer
    tensors: dict[str, Tensors]
    specs: dict[str, jax.ShapeDtypeStruct]
    merged: frozenset[str] = frozenset()

    def read(self, name: str) -> np.ndarray:
        """A parameter, in the dtype of its spec."""
        leaf, dtype = self.tensors[name].read(name), self.specs[name].dtype
        if name not in self.merged and leaf.dtype == dtype:
            return leaf
        with np.errstate(over="ignore"):
            if name in self.merged:
                a, b, scale = (self.tensors[n].read(n) for n in (lora.beside(name, part) for part in lora.LEAVES))
                cast = lora.merged(leaf, a, b, scale, dtype)
            else:
                cast = leaf.astype(dtype)
        # One layer at a time: a stack in float32 is twice its size in memory.
        if not all(np.isfinite(part.astype(np.float32)).all() for part in (cast if cast.ndim > 1 else [cast])):
            raise UsageError(f"{self.directory}: {name} does not fit in {dtype}; use --dtype bfloat16 or float32")
        return cast


def open_source(directory: epath.PathLike, step: reader.Step = None) -> Source:
    """Opens a checkpoint and checks that its parameters are the model's and its adapters'.

    Raises:
      UnusableCheckpoint: they are not, or a base is gone or changed.
    """
    directory = epath.Path(directory)
    metadata = model_json.read(directory)
    config = config_from_json(dict(metadata.model))
    tensors = reader.sources(directory, step)
    specs = {name: leaves.spec(name) for name, leaves in tensors.items()}
    reader.check_specs(specs, params.flatten(lora.add_found(abstract_params(config), specs)), str(directory))
    words = tokenizer.load(directory / model_json.TOKENIZER, metadata.prompt.legacy)
    return Source(directory, metadata, config, words, tensors, specs)


def adapted(source: Source) -> list[str]:
    """The kernels that have an adapter."""
    return [name for name in lora.targets(source.specs) if lora.beside(name, lora.A) in source.specs]


def merge_adapters(source: Source, kernels: Iterable[str] | None = None) -> Source:
    """The checkpoint as it reads without adapters: those of `kernels` (None: all) are added, others are left out."""
    specs = {name: spec for name, spec in source.specs.items() if lora.kernel_of(name) is None}
    return source._replace(specs=specs, merged=frozenset(adapted(source) if kernels is None else kernels))
