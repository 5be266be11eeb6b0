"""Videos: which frames are shown, what their features are, and files that lie or are damaged."""

import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from llava_jax.batch import NEWLINE
from llava_jax.errors import MissingFile, MissingPackage, UsageError
from llava_jax.prompt import templates, tokenizer, video
from llava_jax.prompt.anyres import Tiling
from llava_jax.prompt.conversation import Conversation, Turn, Video, question, with_markers
from llava_jax.prompt.encode import Format, encode
from llava_jax.prompt.images import to_pixels
from llava_jax.prompt.video import FrameRule
from tests import videos
from tests.prompt.test_anyres import GOLDEN

WORDS = tokenizer.load(GOLDEN / "tiny_llama.model", legacy=True)
ONEVISION = Tiling(((1, 1), (2, 2)), max_tiles=9, several=False)


FOUR, EIGHT = FrameRule(4), FrameRule(8)


def format_of(rule=FOUR, mode="anyres", tiling=ONEVISION):
    return Format(templates.get("v1"), WORDS, 28, 9, mode, tiling=tiling, video=rule)


def shown(place, rule=EIGHT, root=None):
    """The frames as arrays; their number is the one that is known before."""
    found = list(video.frames(Video(place), rule, root))
    assert len(found) == video.count(Video(place), rule, root)
    return [np.asarray(frame) for frame in found]


def decoded(path):
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_the_frames_that_are_shown():
    """The indices of LLaVA-NeXT's process_video_with_pyav, but that a short video is not lengthened."""
    for total in (1, 5, 31, 32, 33, 100, 977):
        found = video.indices(total, 29.97, FrameRule(32))
        wanted = np.linspace(0, total - 1, 32, dtype=int).tolist() if total > 32 else list(range(total))
        assert found == wanted and len(set(found)) == len(found)
    assert video.indices(100, 25.0, FrameRule(32, 1.0)) == [0, 25, 50, 75]
    assert video.indices(100, 29.97, FrameRule(32, 2.0)) == list(range(0, 100, 15))
    assert video.indices(1000, 25.0, FrameRule(32, 1.0)) == np.linspace(0, 999, 32, dtype=int).tolist()
    assert video.indices(10, 1.0, FrameRule(32, 10.0)) == list(range(10))  # no frame is shown twice
    assert video.indices(50, None, FrameRule(8, 1.0)) == np.linspace(0, 49, 8, dtype=int).tolist()
    assert video.indices(50, 25.0, FrameRule(1)) == [0]


@pytest.mark.parametrize("name", videos.KINDS)
def test_frames_of_a_file_are_those_that_decoding_it_whole_gives(tmp_path, name):
    path = videos.write(tmp_path / name, videos.moving(50))
    whole = decoded(path)
    assert len(whole) == 50
    for place, root in ((str(path), None), (name, tmp_path), (path, None), (path.read_bytes(), None)):
        np.testing.assert_array_equal(shown(place, root=root), [whole[i] for i in (0, 7, 14, 21, 28, 35, 42, 49)])
    np.testing.assert_array_equal(shown(path, FrameRule(50, 5.0)), whole[::5])


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path):
    whole = videos.write(tmp_path / "a.mp4", videos.moving(50))
    path = videos.cut_without_encoding(tmp_path / "cut.mp4", whole, hidden=20)
    assert len(decoded(path)) == 30
    np.testing.assert_array_equal(shown(path, FrameRule(64)), decoded(path))


def test_frames_of_a_folder_come_in_natural_order(tmp_path):
    frames = videos.moving(12)
    videos.write_folder(tmp_path / "clip", frames)
    for place, root in ((tmp_path / "clip", None), ("clip", tmp_path)):
        np.testing.assert_array_equal(shown(place, FrameRule(12), root), frames)
    np.testing.assert_array_equal(shown("clip", FrameRule(3), tmp_path), [frames[i] for i in (0, 5, 11)])
    np.testing.assert_array_equal(shown([Image.fromarray(frame) for frame in frames], FrameRule(12)), frames)


def test_letters_that_are_digits_elsewhere_are_letters_of_a_frames_name(tmp_path):
    frames = videos.moving(4)
    for name, frame in zip(("1.png", "10.png", "\u00b21.png", "\u06631.png"), frames):  # a superscript 2, an Arabic 3
        Image.fromarray(frame).save(tmp_path / name)
    np.testing.assert_array_equal(shown(tmp_path, FrameRule(4)), frames)


def test_a_video_in_a_bucket_is_read(bucket, tmp_path):
    path = videos.write(tmp_path / "a.mp4", videos.moving(20))
    (epath.Path(bucket) / "clips" / "a.mp4").write_bytes(path.read_bytes())
    np.testing.assert_array_equal(shown("clips/a.mp4", root=bucket), shown(path))
    for i, frame in enumerate(videos.moving(3)):
        Image.fromarray(frame).save(tmp_path / "frame.png")
        (epath.Path(bucket) / "folder" / f"{i}.png").write_bytes((tmp_path / "frame.png").read_bytes())
    np.testing.assert_array_equal(shown("folder", root=bucket), videos.moving(3))


def test_what_is_no_video_is_refused_by_name(tmp_path):
    whole = videos.write(tmp_path / "a.mp4", videos.moving(50))
    content = whole.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(videos.write(tmp_path / "a.mkv", videos.moving(50)).read_bytes()[:2000])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    (tmp_path / "outside").symlink_to(tmp_path.parent)
    # A playlist names files that FFmpeg would then open.
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{whole}\n")
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {whole}\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    damaged = content[: len(content) // 3] + b"\0" * 200 + content[len(content) // 3 + 200 :]
    for place, message in (
        ("text.mp4", "video '.*text.mp4': no video, or a damaged one .*: replace the file or drop the record"),
        ("list.mp4", "no video, or a damaged one"), ("concat.mp4", "no video, or a damaged one"),
        ("still.png", "no video, or a damaged one"), ("empty", "video 'empty': no frames in it; want pictures"),
        ("../a.mp4", "want a path inside the image folder"), ("outside/x.mp4", "no such file or folder"),
        (b"", "video given as 0 bytes: no video"), (damaged, "video given as .* bytes: no video, or a damaged one"),
        ([], "video given as pictures: no frames"), (3, "video given as int: want a path"),
        ("none.mp4", "video '.*none.mp4': no such file or folder"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            list(video.frames(Video(place), FrameRule(50), tmp_path))
    with pytest.raises(MissingFile):
        video.count(Video("none.mp4"), FrameRule(4), tmp_path)
    with pytest.raises(UsageError, match="link to .* outside of the image folder"):
        (tmp_path / "inside").mkdir()
        (tmp_path / "inside" / "b.mp4").symlink_to(whole)
        list(video.frames(Video("b.mp4"), FrameRule(4), tmp_path / "inside"))


def test_a_title_that_is_no_utf8_does_not_matter(tmp_path):
    import av

    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        stream.pix_fmt, container.metadata["title"] = "yuv420p", "Caf#"
        black = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for packet in (*stream.encode(black), *stream.encode()):
            container.mux(packet)
    latin = (tmp_path / "a.avi").read_bytes().replace(b"Caf#", b"Caf\xe9")
    assert b"Caf\xe9" in latin and len(list(video.frames(Video(latin), FrameRule(4)))) == 1


def test_sound_alone_and_a_file_that_holds_less_than_it_says_are_refused(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UsageError, match="no frames in it, only sound"):
        video.count(Video(tmp_path / "sound.mp4"), FrameRule(4))
    # A broadcast that is cut within a group of frames: what refers to those before cannot be decoded.
    late = videos.write(tmp_path / "a.ts", videos.moving(50)).read_bytes()[20 * 188 :]
    assert video.count(Video(late), FrameRule(64)) == 41
    with pytest.raises(UsageError, match="18 of its 41 frames can be decoded; encode it anew or drop the record"):
        list(video.frames(Video(late), FrameRule(64)))


def test_without_pyav_a_file_says_what_to_install_and_a_folder_needs_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackage, match=r"`pip install av` \(the extra `video`\); or give each video as a folder"):
        video.count(Video(b"x"), FrameRule(4))
    videos.write_folder(tmp_path / "clip", videos.moving(2))
    assert len(list(video.frames(Video("clip"), FrameRule(4), tmp_path))) == 2


def test_pyav_is_imported_by_a_file_alone():
    code = "import sys, llava_jax.prompt.encode; assert 'av' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_frames_pooled_in_a_drawing():
    found = video.layout(2, 16, newline=True)
    assert found.tiles == 2 and len(found.slots) == 9
    assert found.corners.slots.tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15],
        [16, 17, 20, 21], [18, 19, 22, 23], [24, 25, 28, 29], [26, 27, 30, 31], [NEWLINE] * 4,
    ]  # fmt: skip
    assert found.corners.weights.tolist() == [[0.25] * 4] * 8 + [[1, 0, 0, 0]]
    assert len(video.layout(32, 729, newline=True).slots) == 32 * 14 * 14 + 1
    assert len(video.layout(3, 9, newline=False).slots) == 3 * 2 * 2
    assert len(video.layout(2, 1, newline=True).slots) == 3


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 12, 27])
def test_features_are_pooled_as_transformers_pools_them(side):
    torch = pytest.importorskip("torch")
    rng, frames = np.random.default_rng(0), 3
    features = rng.normal(size=(frames, side * side, 8)).astype(np.float32)
    square = torch.tensor(features).view(frames, side, side, 8).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(square, size=[-(-side // 2)] * 2, mode="bilinear")
    layout = video.layout(frames, side * side, newline=False)
    slots, weights = layout.corners
    ours = (features.reshape(-1, 8)[slots] * weights[..., None]).sum(1)
    np.testing.assert_allclose(ours, wanted.permute(0, 2, 3, 1).reshape(-1, 8).numpy(), atol=1e-5)


def test_an_example_has_a_videos_frames_among_pictures_and_the_same_tokens_unopened(tmp_path):
    path, picture = videos.write(tmp_path / "a.mp4", videos.moving(10)), Image.new("RGB", (60, 50), "red")
    turns = (Turn("user", "<image>\nand <image>\nWhat?"), Turn("assistant", "A cat."))
    for format, tiles in (
        (format_of(), 5), (format_of(mode="square", tiling=None), 1),
        (format_of(tiling=Tiling(((1, 1),), merge="flat")), 2),
    ):  # fmt: skip
        talk = Conversation(turns, (Video(path), picture), images_in_place=True)
        one, other = (encode(talk, format, open_images=look) for look in (True, False))
        newline = int(format.tiling is not None and format.tiling.newline)
        assert [span.length for span in one.image_spans][0] == 4 * 4 + newline
        assert one.image_spans == other.image_spans and one.tokens.tolist() == other.tokens.tolist()
        assert len(one.images) == one.tiles == other.tiles == 4 + tiles and other.images == ()
        assert len(one.layouts) == len(other.layouts) == 2 and one.image_spans[1].length == len(one.layouts[1].slots)
        mode = "squash" if format.tiling else "square"
        frames = list(video.frames(Video(path), format.video))
        np.testing.assert_array_equal(one.images[:4], [to_pixels(frame, 28, mode) for frame in frames])


def test_a_question_shows_videos_where_their_markers_stand():
    clip, picture = Video("a.mp4"), "b.png"
    assert question("Where?", [clip]).turns[0].text == "<image>\nWhere?"
    talk = question("<video> or <image>?", [clip, picture])
    assert talk.turns[0].text == "<image> or <image>?" and talk.images_in_place
    assert with_markers("<image> or <image>?", [clip, picture]) == "<image> or <image>?"
    assert with_markers("<video>?", [picture]) == "<image>\n<video>?"  # letters, as there is no video
    with pytest.raises(UsageError, match="marker 2 of the question is <video>, which stands for a picture"):
        question("<image> or <video>?", [clip, picture])
    with pytest.raises(UsageError, match="the question has 1 <image> for 2 picture"):
        question("<video>?", [clip, picture])


def test_a_format_without_a_rule_refuses_a_video():
    talk = question("Where?", [Video([Image.new("RGB", (8, 8))])])
    with pytest.raises(UsageError, match="no rule for its frames: set prompt.frames"):
        encode(talk, format_of(rule=None), reply=True)


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (-1, 0.0, "prompt.frames=-1: want"), (5000, 0.0, "prompt.frames=5000"), (True, 0.0, "prompt.frames=True"),
        (8, -1.0, "prompt.fps=-1.0: want"), (0, 1.0, "prompt.fps=1.0 with prompt.frames=0"),
    ],
)  # fmt: skip
def test_words_that_describe_no_rule_are_refused(frames, fps, message):
    with pytest.raises(UsageError, match=message):
        video.rule(frames, fps)


def test_a_rule_goes_through_json_and_wants_features_in_a_square():
    for one in (None, FrameRule(32), FrameRule(16, 2.0)):
        assert video.from_json(video.to_json(one)) == one
    assert video.rule(0, 0.0) is None
    with pytest.raises(UsageError, match="video of keys .'frames'.: want frames, fps"):
        video.from_json({"frames": 3})
    for features, in_row in ((32, True), (16, False)):
        with pytest.raises(UsageError, match=f"prompt.frames=8: the {features} features of a frame are no square"):
            video.check(FrameRule(8), features, in_row)
