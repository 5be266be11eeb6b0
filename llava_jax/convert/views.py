"""Tensors of others seen another way: one bias as two, and positions of another grid."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from llava_jax.convert.files import Spec, TensorFiles

_WHOLE, _FIRST, _LAST = ".self_attn.qkv.bias", ".self_attn.qkv.q_bias", ".self_attn.qkv.v_bias"


def shapes(tensors: TensorFiles) -> dict[str, tuple[int, ...]]:
    """{name: shape}."""
    return {name: tuple(spec.shape) for name, spec in tensors.specs.items()}


class _View(TensorFiles):
    """The tensors of others with some of them replaced.

    made: {new name: (name of theirs, its spec as it is made, how)}; what `hidden` names is not shown.
    """

    def __init__(
        self, tensors: TensorFiles, hidden: set[str], made: Mapping[str, tuple[str, Spec, Callable[..., np.ndarray]]]
    ):
        self.path, self._tensors, self._made = tensors.path, tensors, made
        self.specs = {name: spec for name, spec in tensors.specs.items() if name not in hidden}
        self.specs |= {name: spec for name, (_, spec, _) in made.items()}

    def read(self, name: str) -> np.ndarray:
        if name not in self._made:
            return self._tensors.read(name)
        theirs, _, make = self._made[name]
        return make(self._tensors.read(theirs))


def with_split_biases(tensors: TensorFiles) -> TensorFiles:
    """Hugging Face's tensors with each bias of queries, keys and values as two, without the keys'.

    LAVIS has no bias of keys and writes zeros here. Whatever it is, it shifts all scores of a query alike, which the
    softmax does not see.
    """
    whole, made = {name for name in tensors.specs if name.endswith(_WHOLE)}, {}
    for name in whole:
        (size,), dtype = tensors.specs[name]
        spec, start = Spec((size // 3,), dtype), name.removesuffix(_WHOLE)
        made[start + _FIRST] = (name, spec, lambda bias: bias[: len(bias) // 3])
        made[start + _LAST] = (name, spec, lambda bias: bias[2 * len(bias) // 3 :])
    return _View(tensors, whole, made)


def joined_specs(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Specs as `joined` gives them: the whole bias stands where that of the values stood."""
    found = {}
    for name, spec in specs.items():
        if name.endswith(_LAST):
            found[name.removesuffix(_LAST) + _WHOLE] = Spec((3 * spec.shape[0],), spec.dtype)
        elif not name.endswith(_FIRST):
            found[name] = spec
    return found


def joined(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensors as they come, each pair of biases as one, with zeros for the keys."""
    waiting: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if name.endswith(_FIRST):
            waiting[name.removesuffix(_FIRST)] = np.array(tensor)
        elif name.endswith(_LAST):
            start = name.removesuffix(_LAST)
            yield start + _WHOLE, np.concatenate([waiting.pop(start), np.zeros_like(tensor), tensor])
        else:
            yield name, tensor
        del tensor  # it would live on while the next one is read
    assert not waiting, sorted(waiting)


def resized(tensors: TensorFiles, name: str, side: int, class_token: bool) -> TensorFiles:
    """The tensors with the positions `name` interpolated to `side` x `side` patches."""
    spec = tensors.specs[name]
    shape = (*spec.shape[:-2], side * side + class_token, spec.shape[-1])
    made = (name, Spec(shape, spec.dtype), lambda array: interpolated(array, side, class_token))
    return _View(tensors, {name}, {name: made})


def interpolated(positions: np.ndarray, side: int, class_token: bool) -> np.ndarray:
    """[..., 1 + n * n, C] -> [..., 1 + side * side, C], a class token's as it is, in float32 within.

    torch's bicubic (a = -0.75, align_corners=False, edges repeated), which jax.image.resize's (a = -0.5) is not.
    Source: LAVIS eva_vit.py interpolate_pos_embed; transformers modeling_clip.py interpolate_pos_encoding.
    """
    own, grid = positions[..., :class_token, :], positions[..., class_token:, :].astype(np.float32)
    size = round(grid.shape[-2] ** 0.5)
    weights = _bicubic(size, side)
    grid = grid.reshape(*grid.shape[:-2], size, size, -1)
    grid = np.einsum("rp,...pqc,sq->...rsc", weights, grid, weights, optimize=True)
    grid = grid.reshape(*grid.shape[:-3], side * side, -1).astype(positions.dtype)
    return np.concatenate([own, grid], axis=-2)


def _bicubic(size: int, side: int, a: float = -0.75) -> np.ndarray:
    """float32 [side, size]: the share of each old place in each new one. Source: Keys 1981."""
    weights = np.zeros((side, size))
    for new in range(side):
        at = (new + 0.5) * size / side - 0.5
        first = int(np.floor(at)) - 1
        for old in range(first, first + 4):
            x = abs(at - old)
            near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * a * x - 4 * a
            weights[new, min(max(old, 0), size - 1)] += near if x <= 1 else far
    return weights.astype(np.float32)
