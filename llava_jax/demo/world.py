"""The synthetic world: one to three coloured shapes in the four corners of a picture, with captions and questions.

Everything is a pure function of a seed: scenes, their pictures, captions, questions and answers. Scenes fall into three
disjoint splits: training, held out (arrangements in no training picture or text), and unseen, the compositional split
(at least one shape whose colour occurs with it in no training picture, CLIP's included; only LLaMA's texts name such).
"""

import hashlib
from typing import NamedTuple

import numpy as np

from llava_jax.errors import UsageError
from llava_jax.prompt.images import encode_jpeg

COLOURS = {
    "red": (214, 44, 40),
    "green": (40, 158, 64),
    "blue": (44, 84, 214),
    "yellow": (238, 196, 30),
    "black": (34, 34, 38),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("northwest", "northeast", "southwest", "southeast")  # one token each; the map's north is up
NUMBERS = ("zero", "one", "two", "three")
PICTURE_PIXELS = 96
HELD_OUT_SHARE = 0.15  # of all scenes without an unseen pair


class Thing(NamedTuple):
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


Scene = tuple[Thing | None, ...]  # one entry for each of PLACES; things in a scene differ from each other

ALL_PAIRS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
# Each colour but one and each shape loses one partner, so that every word still occurs in other pairs.
UNSEEN_PAIRS = (
    Thing("red", "triangle"), Thing("green", "circle"), Thing("blue", "cross"), Thing("yellow", "square"),
)  # fmt: skip
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in UNSEEN_PAIRS)


def split_of(scene: Scene) -> str:
    """The split of a scene, "train", "heldout" or "unseen": a pure function of the scene alone."""
    if any(thing in UNSEEN_PAIRS for thing in scene):
        return "unseen"
    digest = hashlib.sha256("|".join(str(thing) for thing in scene).encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32 else "train"


def random_scene(rng: np.random.Generator, split: str) -> Scene:
    """A scene of a split: one, two or three shapes (equally often) in different corners."""
    pairs = ALL_PAIRS if split == "unseen" else SEEN_PAIRS
    while True:
        count = int(rng.integers(1, 4))
        indices = rng.choice(len(pairs), size=count, replace=False)
        scene: list[Thing | None] = [None] * len(PLACES)
        for place, pair in zip(rng.permutation(len(PLACES))[:count], indices):
            scene[place] = pairs[pair]
        if split_of(tuple(scene)) == split:
            return tuple(scene)


def family(rng: np.random.Generator, count: int) -> list[Scene]:
    """`count` different training scenes, each one small change (a colour, a shape, a place) away from another of them.

    They are the hard negatives of contrastive training: their captions differ in a word or two.
    """
    scenes = [random_scene(rng, "train")]
    while len(scenes) < count:
        new = _change(rng, scenes[int(rng.integers(len(scenes)))])
        things = [thing for thing in new if thing]
        if len(set(things)) == len(things) and new not in scenes and split_of(new) == "train":
            scenes.append(new)
    return scenes


def _change(rng: np.random.Generator, scene: Scene) -> Scene:
    cells = list(scene)
    place = int(rng.choice([i for i, thing in enumerate(scene) if thing]))
    other, thing = int(rng.integers(len(PLACES))), scene[place]
    match int(rng.integers(3)):
        case 0:
            cells[place] = Thing(str(rng.choice(list(COLOURS))), thing.shape)
        case 1:
            cells[place] = Thing(thing.colour, str(rng.choice(SHAPES)))
        case _:
            cells[place], cells[other] = scene[other], thing
    return tuple(cells)


# ---- pictures


def draw(scene: Scene, rng: np.random.Generator, wide: int = 1) -> np.ndarray:
    """The picture of a scene, uint8 [96, 96 * wide, 3]: light ground, jittered place, size, turn and colour of shapes.

    wide: each corner is so many cells wide, and its shape lies in any of them.
    """
    size = PICTURE_PIXELS
    ground = rng.uniform(205, 250) + rng.uniform(-6, 6, 3)
    slope = rng.uniform(-10, 10, 2)
    rows, columns = np.mgrid[0:size, 0 : size * wide] / np.reshape([size, size * wide], (2, 1, 1)) - 0.5
    picture = ground + (slope[0] * rows + slope[1] * columns)[..., None]
    cell = size // 2
    for place, thing in enumerate(scene):
        if thing is None:
            continue
        top, left = cell * (place // 2), cell * (wide * (place % 2) + int(rng.integers(wide)))
        centre = cell / 2 + rng.uniform(-0.07, 0.07, 2) * cell
        cover = _cover(thing.shape, cell, centre, rng.uniform(0.30, 0.38) * cell, rng.uniform(-0.25, 0.25))
        paint = np.array(COLOURS[thing.colour]) + rng.uniform(-18, 18, 3)
        patch = picture[top : top + cell, left : left + cell]
        patch += cover[..., None] * (paint - patch)
    picture += 3 * rng.standard_normal(picture.shape, np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


def jpeg(scene: Scene, rng: np.random.Generator, wide: int = 1) -> bytes:
    """The picture as a JPEG file, since pictures are only read from files."""
    return encode_jpeg(draw(scene, rng, wide))


def blank_jpeg() -> bytes:
    """A uniformly grey picture, for a blind model."""
    return encode_jpeg(np.full((PICTURE_PIXELS, PICTURE_PIXELS, 3), 128, np.uint8))


def _cover(shape: str, size: int, centre: np.ndarray, radius: float, turn: float) -> np.ndarray:
    """How much of each pixel [size, size] the shape covers, 0 to 1, from its signed distance in pixels."""
    y, x = np.mgrid[0:size, 0:size] + 0.5
    y, x = y - centre[0], x - centre[1]
    y, x = y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)
    match shape:
        case "circle":
            distance = np.hypot(x, y) - radius
        case "square":
            distance = np.maximum(abs(x), abs(y)) - 0.88 * radius
        case "triangle":
            slant = np.sqrt(3) / 2
            distance = np.maximum(y, slant * abs(x) - y / 2) - 0.6 * radius
        case "cross":
            long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
            distance = np.maximum(long - radius, short - 0.3 * radius)
        case _:
            raise UsageError(f"shape {shape!r} cannot be drawn; known are {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0, 1)


# ---- words


def caption(scene: Scene) -> str:
    """The things in reading order: "a red circle in the northwest and a blue cross in the southeast"."""
    return _join([f"a {thing} in the {place}" for place, thing in zip(PLACES, scene) if thing])


def shuffled_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The same things in any order, each with its place first or last."""
    parts = [
        f"a {thing} in the {place}" if rng.random() < 0.5 else f"in the {place} a {thing}"
        for place, thing in zip(PLACES, scene) if thing
    ]  # fmt: skip
    return _join([parts[i] for i in rng.permutation(len(parts))])


def scan(scene: Scene) -> str:
    """All four corners in reading order: "northwest red circle, northeast nothing, ..."."""
    return ", ".join(f"{place} {thing or 'nothing'}" for place, thing in zip(PLACES, scene))


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


class Turn(NamedTuple):
    """A question about a scene, its answer, and the kind of question."""

    kind: str
    question: str
    answer: str


SHORT_KINDS = ("count", "colour", "shape", "place", "exists", "beside")
KINDS = (*SHORT_KINDS, "describe")


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> Turn:
    """A question of this kind about the scene, drawn at random, with the one right answer."""
    places = [i for i, thing in enumerate(scene) if thing]
    place = int(rng.choice(places))
    thing = scene[place]
    match kind:
        case "count":
            return Turn(kind, "How many shapes are there?", NUMBERS[len(places)])
        case "colour":
            return Turn(kind, f"What colour is the shape in the {PLACES[place]}?", thing.colour)
        case "shape":
            return Turn(kind, f"What shape is in the {PLACES[place]}?", thing.shape)
        case "place":
            return Turn(kind, f"Where is the {thing}?", f"in the {PLACES[place]}")
        case "exists":
            present = rng.random() < 0.5
            return Turn(kind, f"Is there a {_feature(scene, present, rng)}?", "yes" if present else "no")
        case "beside":
            neighbour = scene[place ^ 1]
            return Turn(kind, f"What is beside the {thing}?", f"a {neighbour}" if neighbour else "nothing")
        case "describe":
            return Turn(kind, "Describe the picture.", caption(scene))
    raise UsageError(f"question kind {kind!r} is unknown; known are {', '.join(KINDS)}")


def turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """A conversation about a scene: five short questions, or (one in four) a description among two of them.

    Both fill a row of 128 tokens; descriptions are rare because each has ten times the words of an answer.
    """
    if rng.random() < 0.25:
        kinds = rng.permutation(["describe", *rng.permutation(SHORT_KINDS)[:2]])
    else:
        kinds = rng.permutation(SHORT_KINDS)[:5]
    return [ask(str(kind), scene, rng) for kind in kinds]


def _feature(scene: Scene, present: bool, rng: np.random.Generator) -> str:
    """A shape, or a colour of a shape, that some thing of the scene has, or that none has."""
    things = [thing for thing in scene if thing]
    if rng.random() < 0.5:
        names, present_names = SHAPES, {thing.shape for thing in things}
    else:
        names = tuple(f"{colour} shape" for colour in COLOURS)
        present_names = {f"{thing.colour} shape" for thing in things}
    return str(rng.choice([name for name in names if (name in present_names) == present]))


class Question(NamedTuple):
    """A question of a test set: the picture's number, and the question with its right answer."""

    picture: int
    turn: Turn


def balanced_questions(scenes: list[Scene], per_kind: int, rng: np.random.Generator) -> list[Question]:
    """About `per_kind` questions of each kind, their answers in the proportions of SHARES, so guessing gains little.

    Raises:
      ValueError: the scenes are too few to have each answer.
    """
    questions = []
    for kind in KINDS:
        shares = SHARES[kind]
        remaining = {answer: -(-per_kind * share // sum(shares.values())) for answer, share in shares.items()}
        for _ in range(1000 * per_kind):
            picture = int(rng.integers(len(scenes)))
            turn = ask(kind, scenes[picture], rng)
            group = turn.answer if turn.answer in remaining else OTHER
            if remaining.get(group, 0):
                remaining[group] -= 1
                questions.append(Question(picture, turn))
            if not any(remaining.values()):
                break
        if any(remaining.values()):
            raise UsageError(f"{len(scenes)} scenes have no {kind} question with the answer "
                             f"{max(remaining, key=remaining.get)!r}: want more scenes")  # fmt: skip
    return questions


OTHER = "other"  # every answer that SHARES does not name
SHARES = {
    "count": {NUMBERS[1]: 1, NUMBERS[2]: 1, NUMBERS[3]: 1},
    "colour": {colour: 1 for colour in COLOURS},
    "shape": {shape: 1 for shape in SHAPES},
    "place": {f"in the {place}": 1 for place in PLACES},
    "exists": {"yes": 1, "no": 1},
    "beside": {"nothing": 1, OTHER: 3},
    "describe": {OTHER: 1},
}
