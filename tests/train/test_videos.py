"""Videos train: packed as padded in a mixture, through a run and its answers, and a moving world is learned."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from PIL import Image

from llava_jax import config as configs
from llava_jax import params
from llava_jax.batch import ResizedBatch
from llava_jax.checkpoint import model_json
from llava_jax.data.packing import packed, padded
from llava_jax.data.sources import open_source
from llava_jax.errors import DataError, UsageError
from llava_jax.generate.assistant import Assistant
from llava_jax.models.llava import Llava, abstract_params
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.conversation import Conversation, Turn, Video
from llava_jax.prompt.encode import Format, encode
from llava_jax.prompt.video import FrameRule
from llava_jax.train import hooks, inputs, step
from llava_jax.train.trainer import Trainer
from tests import videos
from tests.train import moving, tiny

WORDS = tokenizer.load(tiny.TOKENIZER, legacy=True)
SMALL = replace(moving.MODEL, llm=replace(moving.MODEL.llm, layers=1))
FORMAT = Format(templates.get("v1"), WORDS, 28, 16, "anyres", tiling=Tiling(((1, 1), (2, 1)), several=False),
                video=FrameRule(4))  # fmt: skip
STAMPED = FrameRule(4, time_stamps=True)


def mixture():
    """Videos of 2 to 6 frames, of which four at most are shown, pictures, both in one, and a text."""
    rng = np.random.default_rng(3)

    def noise(width=40, height=30):
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    clips = [Video([noise() for _ in range(count)]) for count in (2, 3, 6, 1)]
    shown = [(clips[0],), (noise(90, 30),), (clips[1], noise()), (), (clips[2],), (clips[3], clips[0])]
    for i, images in enumerate(shown):
        turns = (Turn("user", "<image>\n" * len(images) + "Where?"), Turn("assistant", f"To the left, {7 * i}."))
        yield Conversation(turns, images, str(i), images_in_place=len(images) > 1)


def test_videos_in_packed_rows_give_the_loss_and_the_gradients_of_rows_of_their_own():
    """Six records, to 1e-6 of each gradient."""
    rng = np.random.default_rng(1)
    shapes = abstract_params(SMALL)
    parameters = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), shapes)
    one, model = [encode(talk, FORMAT) for talk in mixture()], Llava(SMALL)
    assert [example.tiles for example in one] == [2, 3, 6, 0, 4, 3]

    def batch(rows, tokens, images):
        return jax.tree.map(jnp.asarray, packed([rows[:1], rows[1:]], tokens, images, 28, FORMAT.resizes)[0])

    together = batch([one[:3], one[3:]], 320, 11)
    apart = [batch([[example], []], 160, 6) for example in one]
    assert isinstance(together, ResizedBatch)
    supervised = together.weights.sum()
    assert supervised == sum(each.weights.sum() for each in apart) > 20

    @jax.jit
    @jax.value_and_grad
    def loss_of(leaves, batch):
        return step.weighted_loss(model, leaves, batch, batch.weights / supervised)

    loss, gradients = loss_of(parameters, together)
    parts = [loss_of(parameters, each) for each in apart]
    assert abs(loss - sum(part[0] for part in parts)) <= 1e-6 * abs(loss)
    summed = params.flatten(jax.tree.map(lambda *each: sum(each), *(part[1] for part in parts)))
    for name, ours in params.flatten(gradients).items():
        assert float(jnp.abs(ours - summed[name]).max()) <= 1e-6 * max(1, float(jnp.abs(summed[name]).max())), name
    assert float(jnp.abs(summed["image_newline"]).max()) > 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config of a run on videos in files and folders, pictures and text."""
    folder = tmp_path_factory.mktemp("run")
    path = moving.write(folder, frames=4, steps=3)
    (folder / "shown").mkdir()
    videos.write(folder / "shown" / "a.mp4", videos.moving(12))
    videos.write_folder(folder / "shown" / "b", videos.moving(3, seed=4))
    Image.fromarray(videos.moving(1)[0]).save(folder / "shown" / "c.png")
    keys = [{"video": "a.mp4"}, {"video": "b"}, {"image": "c.png"}, {}, {"videos": ["b", "a.mp4"]}]
    records = []
    for i, one in enumerate(keys * 3):
        marks = "<video>\n" * (2 if "videos" in one else "video" in one) + "<image>\n" * ("image" in one)
        turns = [{"from": "human", "value": f"{marks}Where?"}, {"from": "gpt", "value": f"To the left, {i}."}]
        records.append({"id": str(i), **one, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    text = path.read_text().replace("batch_samples=32, row_tokens=64, images_per_group=4", (
        f"sources=(Source({str(folder / 'records.json')!r}, {str(folder / 'shown')!r}),), layout='packed', "
        "rows_per_chip=2, rows_per_group=2, images_per_group=16, row_tokens=128"))  # fmt: skip
    path.write_text(text.replace("import default", "import Source, default"))
    return path


class Talks(list):
    fingerprint = "talks"


def test_a_run_trains_on_videos_and_answers_as_it_was_trained(run, tmp_path, monkeypatch):
    trainer = Trainer(configs.load(run), workdir=tmp_path / "run")
    trainer.fit()
    assert model_json.read(tmp_path / "run").prompt.video == {"frames": 4, "fps": 0.0}
    source = open_source(run.parent / "records.json", run.parent / "shown")
    talks, assistant = Talks(source[i].conversation for i in (0, 1, 4)), Assistant.open(tmp_path / "run", slots=3)
    logps = assistant.logps(talks, run.parent / "shown")
    monkeypatch.chdir(run.parent / "shown")  # of a data set that is an object paths are relative to this
    assert abs(-np.concatenate(logps).mean() - trainer.evaluate(talks)) < 2e-5


def test_a_run_with_time_stamps_reads_them_and_leaves_out_folders(run, tmp_path):
    """What it trains on is what is asked; without a budget the first record of a folder ends it."""
    changes = {"prompt.time_stamps": True, "data.row_tokens": 400, "data.skip_budget": 0.4}
    config = configs.load(run, changes)
    format = inputs.format_of(config)
    assert format.video == STAMPED
    sources, _ = inputs.open_sources(config, None)
    feed = inputs.feed(config, format, sources, epath.Path(tmp_path))
    shown = [format.tokenizer.decode(row.tolist()) for batch, _ in itertools.islice(feed, 3) for row in batch.tokens]
    assert "The video lasts for 0.48 seconds, and 4 frames are uniformly sampled from it." in "".join(shown)
    assert {one.id for one in feed.bad} <= {str(i) for i in range(15) if i % 5 in (1, 4)} and feed.bad
    with pytest.raises(DataError, match=r"id='\d+' bad_image: record '\d+': a folder of frames, .* has no times"):
        strict = configs.load(run, changes | {"data.skip_budget": 0.0})
        list(itertools.islice(inputs.feed(strict, format, sources, epath.Path(tmp_path)), 3))


def test_samples_with_time_stamps_are_asked_as_trained(run):
    source, format = open_source(run.parent / "records.json", run.parent / "shown"), replace(FORMAT, video=STAMPED)
    found = hooks._questions(source, format)
    talk = source[0].conversation
    wanted = encode(replace(talk, turns=talk.turns[:1]), format, run.parent / "shown", reply=True)
    for look in (True, False):
        assert encode(found[0], format, reply=True, open_images=look).tokens.tolist() == wanted.tokens.tolist()
    assert [talk.id for talk in found] == ["0", "2", "3", "5"]


def test_samples_are_asked_with_the_frames_that_are_shown(run):
    source = open_source(run.parent / "records.json", run.parent / "shown")
    found = hooks._questions(source, FORMAT)
    assert [[len(one.source) if isinstance(one, Video) else 1 for one in talk.images] for talk in found] == [
        [4], [3], [1], []]  # fmt: skip
    assert all(isinstance(frame, Image.Image) for frame in found[0].images[0].source)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.images_per_group": 3}, DataError, "4 images for images_per_group=3: set data.images_per_group=4"),
        ({"prompt.frames": 0}, DataError, "video='a.mp4': video is not read without a rule"),
        ({"prompt.frames": -1}, UsageError, "prompt.frames=-1: want the most frames of a video"),
        ({"prompt.fps": 1.0, "prompt.frames": 0}, UsageError, "prompt.fps=1.0 with prompt.frames=0"),
        ({"prompt.time_stamps": True, "prompt.frames": 0}, UsageError, "prompt.time_stamps=True with prompt.frames=0"),
    ],
)
def test_a_run_that_cannot_read_its_videos_says_what_to_set(run, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        Trainer(configs.load(run, changes), workdir=tmp_path / "run").fit()


def test_a_model_whose_newline_is_missing_is_refused(run, tmp_path):
    tiny.write_base(tmp_path / "base")
    with pytest.raises(UsageError, match="each line ends with image_newline, which this model has not"):
        Trainer(configs.load(run, {"model.base": str(tmp_path / "base")}), workdir=tmp_path / "run").fit()


def test_which_came_first_is_learned_from_frames_and_not_from_one():
    """A smaller model than the next test's, of one question, without a trainer: 60 updates on 320 clips."""
    model, format = Llava(SMALL), replace(FORMAT, template=templates.get("mistral"))
    optimizer = optax.adam(3e-3)

    def batch(seed, single):
        clips = moving.Clips(32, seed, (moving.FIRST,), single)
        examples = [encode(clips[i], format) for i in range(32)]
        return jax.tree.map(jnp.asarray, padded(examples, 48, 4, 28, format.resizes)[0])

    @jax.jit
    def update(leaves, state, batch):
        gradients = jax.grad(lambda x: step.weighted_loss(model, x, batch, batch.weights / batch.weights.sum()))(leaves)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(leaves, updates), state

    @jax.jit
    def right(leaves, batch):
        """Of the answers' first ids."""
        apply = {"params": leaves}
        fields = (batch.tokens, batch.positions, batch.segments, batch.image_slots, batch.pixels, batch.corners)
        hidden = model.apply(apply, *fields)
        rows, first = jnp.arange(len(hidden)), (batch.weights > 0).argmax(1)
        chosen = model.apply(apply, hidden[rows, first], method="head").argmax(-1)
        return (chosen == batch.targets[rows, first]).mean()

    start, found = moving.weights(SMALL), {}
    for single in (False, True):
        leaves, state, pool = start, optimizer.init(start), [batch(i, single) for i in range(10)]
        for i in range(60):
            leaves, state = update(leaves, state, pool[i % 10])
        found[single] = float(np.mean([right(leaves, batch(1000 + i, single)) for i in range(3)]))
    print(f"right: {found[False]:.2f} with four frames, {found[True]:.2f} with one")
    assert found[False] >= 0.9 and found[True] <= 0.65


def trained(folder, steps, **clips):
    """Accuracy on new clips, after so many steps of 32."""
    folder.mkdir()
    settings = configs.load(moving.write(folder, frames=4, steps=steps))
    Trainer(settings, moving.Clips(32 * steps, 0, **clips), workdir=folder / "run").fit()
    return moving.accuracy(Assistant.open(folder / "run", slots=50), moving.Clips(200, 1, **clips))


@pytest.mark.slow
def test_a_moving_world_is_learned_from_frames(tmp_path):
    """With four frames; with one of them, which is a guess however long it trains."""
    frames, single = trained(tmp_path / "frames", 500), trained(tmp_path / "single", 500, single=True)
    print(f"accuracy with four frames {frames}, with one {single}")
    assert frames[moving.WHERE] >= 0.9 and frames[moving.FIRST] >= 0.95
    assert single[moving.WHERE] <= 0.40 and single[moving.FIRST] <= 0.65
