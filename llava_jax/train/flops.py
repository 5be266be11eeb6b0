"""Model FLOPs: what one update must compute, whatever a machine spends on it; counted on the forward pass's jaxpr.

Matrix products and convolutions count, two operations for each multiplication with its addition: once forward, and
once more for each factor that depends on a trainable parameter, as that one needs a gradient. Left out are padding,
blank images, rematerialisation, logits of unsupervised positions, and all that is linear in the activations (norms,
rotations, the optimizer). No layer is named here: a new tower, connector or decoder is counted as it is traced.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from llava_jax import params
from llava_jax.models.llava import Llava

# What a value depends on: trainable parameters, the row of tokens, both, or neither.
Origins = frozenset[str]
NONE, TRAINABLE, ROW = Origins(), Origins({"trainable"}), Origins({"row"})


class ModelFlops(NamedTuple):
    """FLOPs of one update for each of what it learns from.

    tokens: positions of the decoder that are no padding, image features included.
    pairs: (query, key) pairs of the decoder's attention: n (n + 1) / 2 for a sample of n tokens.
    supervised: positions whose logits are made.
    images: images that the tower runs on.
    """

    tokens: int
    pairs: int
    supervised: int
    images: int

    def total(self, *, tokens: int, pairs: int, supervised: int, images: int) -> int:
        """FLOPs of an update on so many of each."""
        return sum(each * times for each, times in zip(self, (tokens, pairs, supervised, images)))


class Forward(NamedTuple):
    """A model's forward pass, as the jaxprs of two functions of its parameters, which come first."""

    names: tuple[str, ...]  # of the parameters
    hidden: Jaxpr  # of a row of tokens, and pixels
    logits: Jaxpr  # of hidden states


def trace(model: Llava, parameters: Mapping[str, Any]) -> Forward:
    """The forward pass of one token and one image, in float32: no kernel takes them, so the jaxprs hold every product.

    Of an image of more than 1,024 positions attention's last tile of queries counts with its padding.

    Args:
      parameters: arrays or shapes, nested, with the adapters that there are.
    """
    model, side = model.clone(dtype=jnp.float32, remat="none", vision_remat="none"), model.config.vision.image_size
    row, pixels = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.uint8)
    flat = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.flatten(parameters).items()}

    def hidden(flat: Mapping[str, jax.Array], row: jax.Array, pixels: jax.Array) -> jax.Array:
        return model.apply({"params": params.unflatten(flat)}, row, row, row, row, pixels)

    def logits(flat: Mapping[str, jax.Array], hidden: jax.Array) -> jax.Array:
        return model.apply({"params": params.unflatten(flat)}, hidden, method="head")

    body, states = jax.make_jaxpr(hidden, return_shape=True)(flat, row, pixels)
    return Forward(tuple(sorted(flat)), body.jaxpr, jax.make_jaxpr(logits)(flat, states).jaxpr)


def count(forward: Forward, trainable: Collection[str]) -> ModelFlops:
    """The model FLOPs of an update; those of a forward pass, where nothing is trainable.

    Args:
      trainable: names of parameters; a stack of layers is trainable or frozen as one.

        LLaVA-1.5-7B, a sample of 850 tokens, logits everywhere, decoder trainable, no image: 34.3e12
    """
    parameters = [TRAINABLE if name in trainable else NONE for name in forward.names]
    found, hidden = _walk(forward.hidden, [*parameters, ROW, NONE])
    at_head, _ = _walk(forward.logits, [*parameters, *hidden])
    return ModelFlops(found["tokens"], found["pairs"], at_head.total(), found["images"])


def _walk(jaxpr: Jaxpr, inputs: Sequence[Origins]) -> tuple[Counter[str], list[Origins]]:
    """(FLOPs by field of `ModelFlops`, origins of the outputs) of a jaxpr, given the origins of its inputs."""
    known, found = dict(zip(jaxpr.invars, inputs, strict=True)), Counter[str]()

    def origins(values: Sequence[Any]) -> list[Origins]:
        return [NONE if isinstance(x, Literal) else known.get(x, NONE) for x in values]

    for equation in jaxpr.eqns:
        flops, outputs = _equation(equation, origins(equation.invars))
        found += flops
        known.update(zip(equation.outvars, outputs, strict=True))
    return found, origins(jaxpr.outvars)


def _equation(equation: JaxprEqn, inputs: list[Origins]) -> tuple[Counter[str], list[Origins]]:
    """As `_walk`, of one equation."""
    name, flops = equation.primitive.name, Counter[str]()
    if name == "scan":
        return _scan(equation, inputs)
    if name == "optimization_barrier":
        return flops, inputs
    bodies = [body for body in jaxprs_in_params(equation.params) if _shapes(body.outvars) == _shapes(equation.outvars)]
    if bodies:  # what is called, or the branches of a `cond`; a `while` runs over attention's tiles of keys: here one
        walked = [_walk(body, inputs[len(inputs) - len(body.invars) :]) for body in bodies]
        outputs = [NONE.union(*same) for same in zip(*(own for _, own in walked))]
        return max((own for own, _ in walked), key=Counter.total), outputs
    if name in PRODUCTS:
        rows, gradients = (sum(origin <= factor for factor in inputs) for origin in (ROW, TRAINABLE))
        kind = ("images", "tokens", "pairs")[rows]  # a product of two of the row's values is attention's
        flops[kind] = PRODUCTS[name](equation) * (1 + gradients)
    return flops, [NONE.union(*inputs)] * len(equation.outvars)


def _scan(equation: JaxprEqn, inputs: Sequence[Origins]) -> tuple[Counter[str], list[Origins]]:
    """Layer after layer, until what is carried has the same origins before and after: so have all layers from there."""
    (body,), left, found = jaxprs_in_params(equation.params), equation.params["length"], Counter[str]()
    # Constants, then what is carried, then slices, whose shape is another one inside (jax 0.10 and 0.12 name the counts
    # differently).
    end, carried = _same(equation.invars, body.invars), _same(equation.outvars, body.outvars)
    outputs = [*inputs[end - carried : end], *[NONE] * (len(equation.outvars) - carried)]
    while left:
        before = outputs[:carried]
        flops, outputs = _walk(body, [*inputs[: end - carried], *before, *inputs[end:]])
        runs = left if outputs[:carried] == before else 1
        found += Counter({kind: runs * each for kind, each in flops.items()})
        left -= runs
    return found, outputs


def _same(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    return sum(one == other for one, other in zip(_shapes(outer), _shapes(inner), strict=True))


def _shapes(values: Sequence[Any]) -> list[tuple[int, ...]]:
    return [x.aval.shape for x in values]


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * inner * equation.outvars[0].aval.size


def _convolution(equation: JaxprEqn) -> int:
    kernel = equation.invars[1].aval
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * kernel.size // features * equation.outvars[0].aval.size


PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}
