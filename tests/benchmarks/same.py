"""What both sides of the benchmark are given: one model in both layouts, one set of records, and their tokens."""

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_jax import params
from llava_jax.batch import Example
from llava_jax.checkpoint import model_json, reader
from llava_jax.checkpoint.model_json import Metadata, PromptMetadata
from llava_jax.data import trees
from llava_jax.data.packing import cut
from llava_jax.data.sources import open_source
from llava_jax.models import presets
from llava_jax.models.llava import abstract_params
from llava_jax.models.presets import LlamaConfig, LlavaConfig, VisionConfig
from llava_jax.plan import mixture
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.conversation import IMAGE_MARKER, Turn
from llava_jax.prompt.encode import Format, encode
from llava_jax.prompt.images import encode_jpeg

TOKENIZER = Path(__file__).parents[1] / "golden" / "tiny_llama.model"
OURS, THEIRS, RECORDS, PICTURES, BATCHES = "ours", "theirs", "records.json", "pictures", "batches.pickle"
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-1.6's
TILES = 5  # the whole and 2 x 2 tiles: pictures of the sizes below
WORDS = "a the red small square left of and what is it picture on there three circle green under it has no".split()


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    samples: of a training step. shortest, longest: tokens of a sample. packed: rows and their tokens that hold the
      samples of any step. steps: that a training turn makes. mixture: records of a step with the lengths of LLaVA-1.5's
      665k, most tokens of one, and tokens of a packed row; their pictures are of `image_size`.
    prompt_tokens, new_tokens: of an answer. records: with one picture each, for the input pipeline.
    """

    model: LlavaConfig
    samples: int
    shortest: int
    longest: int
    packed: tuple[int, int]
    steps: int
    mixture: tuple[int, int, int]
    prompt_tokens: int
    new_tokens: int
    records: int
    picture: tuple[int, int]  # height and width of a file, before it is resized
    image_size: int  # that the input pipeline resizes to, and a mixture's pictures


FULL = Sizes(
    LlavaConfig(
        VisionConfig(image_size=112, patch_size=14, width=384, mlp_width=1536, layers=6, heads=6), "mlp2x_gelu",
        LlamaConfig(vocab=8000, width=512, mlp_width=1376, layers=8, heads=8, kv_heads=8, head_width=64,
                    max_positions=2048),
    ),
    samples=4, shortest=160, longest=512, packed=(2, 720), steps=3, mixture=(64, 2048, 4096), prompt_tokens=128,
    new_tokens=128, records=96, picture=(480, 640), image_size=336,
)  # fmt: skip
SMALL = Sizes(
    replace(presets.get("tiny"), llm=replace(presets.get("tiny").llm, vocab=1000)),  # with room for an <image> token
    samples=2, shortest=100, longest=128, packed=(1, 256), steps=2, mixture=(5, 128, 256), prompt_tokens=90,
    new_tokens=5, records=5,
    picture=(40, 60), image_size=28,
)  # fmt: skip


def write(folder: Path, sizes: Sizes) -> None:
    """A random checkpoint of ours and its export for transformers, records with pictures, and batches of samples."""
    _write(folder, sizes, _lengths)


def write_mixture(folder: Path, sizes: Sizes) -> Sizes:
    """As `write`, of a mixture's records and of a model for pictures of `image_size`, whose sizes it returns."""
    vision = replace(sizes.model.vision, image_size=sizes.image_size)
    sizes = replace(sizes, model=replace(sizes.model, vision=vision))
    folder.mkdir()
    _write(folder, sizes, _mixtures)
    return sizes


def _write(folder: Path, sizes: Sizes, draw: Callable[[Sizes, np.random.Generator], Mapping[str, "Drawn"]]) -> None:
    from llava_jax.convert import exporting  # brings jax in, which the other side is better without

    rng = np.random.default_rng(0)
    with reader.TensorWriter(folder / OURS / "0" / reader.PARAMS) as writer:
        for name, leaf in params.flatten(abstract_params(sizes.model)).items():
            center = 1.0 if name.endswith("scale") else 0.0
            writer.write(name, rng.normal(center, 0.02, leaf.shape).astype(np.float32))
    words = tokenizer.load(TOKENIZER, legacy=False)
    metadata = Metadata(presets.config_to_json(sizes.model), PromptMetadata("v1", False, "pad", False))
    model_json.write(folder / OURS, metadata, words.files())
    exporting.export("hf", folder / OURS, folder / THEIRS)
    _write_records(folder, sizes, rng)
    examples = _examples(folder, sizes, draw(sizes, rng), rng)
    (folder / BATCHES).write_bytes(pickle.dumps(examples))


def batches(folder: Path) -> dict[str, list[list[Example]]]:
    """{"full": batches of samples that all are `longest`, "mixed": of any length from `shortest` on}; of a mixture
    {"mixture": one step of its records, "shared": one whose records are those of as few pictures as with share_images}.
    """
    return pickle.loads((folder / BATCHES).read_bytes())


def useful_tokens(groups: Sequence[Sequence[Example]]) -> int:
    """Positions of all samples, without padding."""
    return sum(len(example.tokens) for examples in groups for example in examples)


def prompts(folder: Path, sizes: Sizes, count: int) -> list[Example]:
    """Prompts of exactly `prompt_tokens`, each with a picture."""
    return [cut(examples[0], sizes.prompt_tokens)[0] for examples in batches(folder)["prompts"][:count]]


def format_of(folder: Path, image_size: int, features: int, tiled: bool = False) -> Format:
    """The format of our checkpoint, at any image size, or LLaVA-1.6's on it."""
    words = tokenizer.load(folder / OURS / "tokenizer")
    mode, tiling = ("anyres", Tiling(GRIDS)) if tiled else ("pad", None)
    return Format(templates.get("v1"), words, image_size, features, mode, tiling=tiling)


def _write_records(folder: Path, sizes: Sizes, rng: np.random.Generator) -> None:
    """Pictures with the detail of photographs: smooth noise of several sizes."""
    (folder / PICTURES).mkdir()
    records = []
    for i in range(sizes.records):
        (folder / PICTURES / f"{i}.jpg").write_bytes(encode_jpeg(_picture(sizes.picture, rng), 90))
        turns = [("human", "<image>\n" + _words(rng, 12)), ("gpt", _words(rng, 40))]
        turns += [("human", _words(rng, 12)), ("gpt", _words(rng, 40))]
        records.append({"id": str(i), "image": f"{i}.jpg",
                        "conversations": [{"from": role, "value": text} for role, text in turns]})  # fmt: skip
    (folder / RECORDS).write_text(json.dumps(records))


def _picture(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    height, width = size
    total = np.zeros((height, width, 3))
    for grain in (4, 16, 64):
        coarse = rng.normal(0, grain / 2, (height // grain + 1, width // grain + 1, 3))
        total += coarse.repeat(grain, 0).repeat(grain, 1)[:height, :width]
    return np.clip(128 + total + rng.normal(0, 4, total.shape), 0, 255).astype(np.uint8)


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


class Drawn(NamedTuple):
    """Samples of steps: tokens of each, and the number of its picture; int [steps, samples]."""

    tokens: np.ndarray
    pictures: np.ndarray


def _lengths(sizes: Sizes, rng: np.random.Generator) -> dict[str, Drawn]:
    shape = (sizes.steps, sizes.samples)
    tokens = {"full": np.full(shape, sizes.longest), "mixed": rng.integers(sizes.shortest, sizes.longest + 1, shape),
              "prompts": np.full((4, 1), sizes.prompt_tokens)}  # fmt: skip
    return {kind: Drawn(n, rng.integers(sizes.records, size=n.shape)) for kind, n in tokens.items()}


def _mixtures(sizes: Sizes, rng: np.random.Generator) -> dict[str, Drawn]:
    """Neighbours of LLaVA-1.5's mixture as `plan` assumes it: in random order, and in the order of share_images those
    of which as large a part is shared as of all.

    Records without a picture, 6 % of them, get one and are as long as that needs.
    """
    (count, longest, row), features = sizes.mixture, 576
    tokens, _, keys = mixture.records(mixture.LLAVA, features, mixture.FRAME)
    tokens = np.clip(tokens, sizes.model.vision.features + sizes.shortest // 2, longest)
    prefixes = trees.Prefixes((mixture.BEFORE + features) * (keys > 0), keys)
    order, starts = trees.together(tokens, prefixes, rng.permutation(len(tokens)), row)
    again = prefixes.tokens[order] * trees.repeated(keys[order], starts)
    begins = starts[starts + count <= len(order)]
    all_tokens, shared = (np.append(0, np.cumsum(x)) for x in (tokens[order], again))
    shares = (shared[begins + count] - shared[begins]) / (all_tokens[begins + count] - all_tokens[begins])
    begin = begins[np.abs(shares - shared[-1] / all_tokens[-1]).argmin()]
    alone = np.where(keys > 0, keys, -np.arange(len(keys)))
    return {kind: Drawn(tokens[few][None], np.unique(alone[few], return_inverse=True)[1][None])
            for kind, few in (("mixture", np.arange(count)), ("shared", order[begin : begin + count]))}  # fmt: skip


def _examples(
    folder: Path, sizes: Sizes, drawn: Mapping[str, Drawn], rng: np.random.Generator
) -> dict[str, list[list[Example]]]:
    vision = sizes.model.vision
    form = format_of(folder, vision.image_size, vision.features)
    source = open_source(folder / RECORDS, folder / PICTURES)

    def sample(tokens: int, picture: int) -> Example:
        """A record about a picture: a question, and as many turns as `tokens` hold."""
        record = source[picture].conversation
        turns = [Turn("user", f"{IMAGE_MARKER}\n{_words(rng, 12)}"), Turn("assistant", _words(rng, 40))]
        while True:
            example = encode(replace(record, turns=tuple(turns)), form, folder / PICTURES)
            if len(example.tokens) >= tokens:
                return cut(example, tokens)[0]
            turns += [Turn("user", _words(rng, 12)), Turn("assistant", _words(rng, 40))]

    return {kind: [[sample(int(n), int(i)) for n, i in zip(*step)] for step in zip(*steps)]
            for kind, steps in drawn.items()}  # fmt: skip
