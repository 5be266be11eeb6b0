"""Names of parameters and the one way a table over them is read.

A parameter's name is its path, `llm/blocks/q/kernel`. Freezing, rates, decay, sharding, initial values and
conversion are all ordered tables `(pattern, value)`; `lookup` serves every one of them.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from llava_jax.errors import UsageError


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> {name: leaf}, in the tree's own (sorted) order. A leaf is anything that is no mapping."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        if isinstance(tree[key], Mapping):
            flat.update({f"{key}/{name}": leaf for name, leaf in flatten(tree[key]).items()})
        else:
            flat[key] = tree[key]
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{name: leaf} -> nested dict; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def lookup(
    names: Iterable[str], table: Sequence[tuple[str, Any]], what: str, every_row: bool = False
) -> dict[str, Any]:
    """The value of the first row whose pattern matches the whole name, for every name.

    Args:
      names: parameter names.
      table: ordered rows (regular expression, value).
      what: the table's name, for messages ("rates", "sharding").
      every_row: raise if a row matches no name at all (tables a user writes).

    Raises:
      ValueError: a name that no row covers, a row that covers no name (`every_row`), or a broken pattern.

        lookup(["llm/norm/scale", "projector/0/bias"], [("projector/.*", 1e-3), (".*", None)], "rates")
        -> {"llm/norm/scale": None, "projector/0/bias": 1e-3}
    """
    rows = [(_compile(pattern, what), value) for pattern, value in table]
    found: dict[str, Any] = {}
    idle = set(range(len(rows)))
    uncovered = []
    for name in names:
        matching = [i for i, (pattern, _) in enumerate(rows) if pattern.fullmatch(name)]
        if not matching:
            uncovered.append(name)
            continue
        found[name] = rows[matching[0]][1]
        idle.difference_update(matching)
    if uncovered:
        shown = ", ".join(uncovered[:5]) + (f" and {len(uncovered) - 5} more" if len(uncovered) > 5 else "")
        raise UsageError(f'table `{what}` covers no row for {shown}: add a row (".*", ...) at its end')
    if every_row and idle:
        pattern = rows[min(idle)][0].pattern
        raise UsageError(
            f"table `{what}`: pattern {pattern!r} matches no parameter; the names begin with "
            f"{', '.join(sorted({name.split('/')[0] for name in found}))} (see `python -m llava_jax.convert inspect`)"
        )
    return found


def _compile(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"table `{what}`: {pattern!r} is no regular expression ({error})") from None


def split(tree: Mapping[str, Any], chosen: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the chosen names, the rest), each as a nested dict; `merge` puts them together again."""
    flat, chosen = flatten(tree), set(chosen)
    assert chosen <= set(flat), sorted(chosen - set(flat))
    first = {name: leaf for name, leaf in flat.items() if name in chosen}
    rest = {name: leaf for name, leaf in flat.items() if name not in chosen}
    return unflatten(first), unflatten(rest)


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One tree of two that share no leaf."""
    one, two = flatten(first), flatten(second)
    assert not set(one) & set(two), sorted(set(one) & set(two))
    return unflatten(one | two)


def count(tree: Any) -> int:
    """Number of scalars in all leaves (arrays or shapes) of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def overview(tree: Mapping[str, Any], rates: Mapping[str, Any]) -> str:
    """One line for each parameter: name, shape, dtype and rate ("frozen" where there is none)."""
    rows = [
        (name, "x".join(map(str, leaf.shape)) or "scalar", str(leaf.dtype), _rate(rates[name]))
        for name, leaf in flatten(tree).items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]) for row in rows)


def _rate(rate: Any) -> str:
    return "frozen" if rate is None else f"rate {rate}"
