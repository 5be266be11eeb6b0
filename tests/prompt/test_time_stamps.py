"""Time stamps: the sentence and the ids of LLaVA-Video's prompts, from one rule for records, questions and messages."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import UsageError
from llava_jax.prompt import templates, time_stamps, tokenizer, video
from llava_jax.prompt.conversation import Conversation, Turn, Video, question
from llava_jax.prompt.encode import Format, encode
from llava_jax.prompt.video import FrameRule
from tests import videos
from tests.prompt.test_anyres import GOLDEN

WORDS = tokenizer.load(GOLDEN / "tiny_llama.model", legacy=True)
STAMPED = FrameRule(4, time_stamps=True)
# Of 50 frames at 25 a second the 1st, 17th, 33rd and 50th are shown. Source: LLaVA-NeXT llava/train/train.py@df17966.
SENTENCE = ("The video lasts for 2.00 seconds, and 4 frames are uniformly sampled from it. These frames are located at "
            "0.00s,0.64s,1.28s,1.96s.Please answer the following questions related to this video.")  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return Video(videos.write(tmp_path_factory.mktemp("clip") / "a.mp4", videos.moving(50)))


def format_of(rule, template="v1"):
    return Format(templates.get(template), WORDS, 28, 16, "pad", video=rule)


def test_the_sentence_says_the_length_the_number_and_the_times(clip, tmp_path):
    assert time_stamps.sentence(clip, STAMPED) == SENTENCE
    assert time_stamps.sentence(Video(clip.source.read_bytes()), STAMPED) == SENTENCE
    every = videos.write(tmp_path / "b.mkv", videos.moving(3), rate=5)
    assert time_stamps.sentence(Video(every), STAMPED) == (
        "The video lasts for 0.60 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.00s,0.20s,0.40s.Please answer the following questions related to this video.")  # fmt: skip


def released(total, rate, fps, most):
    """(times, number of frames) of a file. Source: LLaVA-NeXT llava/utils.py process_video_with_decord@df17966."""
    step = round(rate / fps)
    chosen = list(range(0, total, step))
    times = [i / step for i in chosen]
    if len(chosen) > most:
        chosen = np.linspace(0, total - 1, most, dtype=int).tolist()
        times = [i / rate for i in chosen]
    return ",".join(f"{one:.2f}s" for one in times), len(chosen)


@pytest.mark.parametrize("rate", [0.6, 10.0, 23.976, 25.0, 29.97, 30000 / 1001, 59.94])
def test_times_are_those_of_the_original_code_at_one_frame_a_second(rate, monkeypatch):
    for total in (1, 7, 100, 959, 960, 4000):
        monkeypatch.setattr(video, "measure", lambda *_, total=total: video.Length(total, rate, 1))
        found = time_stamps.sentence(Video("a"), FrameRule(32, 1.0, True))
        times, count = released(total, rate, 1, 32)
        assert f"lasts for {total / rate:.2f} seconds, and {count} frames" in found and f" at {times}.Please" in found


def test_times_are_seconds_at_any_rate_of_frames(monkeypatch):
    monkeypatch.setattr(video, "measure", lambda *_: video.Length(60, 29.97, 1))
    assert "at 0.00s,0.50s,1.00s,1.50s.Please" in time_stamps.sentence(Video("a"), FrameRule(8, 2.0, True))
    monkeypatch.setattr(video, "measure", lambda *_: video.Length(3, 0.5, 1))  # slower than what is asked for
    found = time_stamps.sentence(Video("a"), FrameRule(8, 2.0, True))
    assert "lasts for 6.00 seconds, and 3 frames" in found and "at 0.00s,2.00s,4.00s.Please" in found


def test_a_prompt_has_the_ids_of_the_sentence_behind_the_marker(clip):
    """As LLaVA-NeXT trains: `<image>`, the sentence, and what stood in the question beside its marker."""
    plain, stamped = format_of(FrameRule(4)), format_of(STAMPED)
    answer = Turn("assistant", "To the left.")
    for asked, written in (
        ("<image>\nWhere?", f"<image>\n{SENTENCE}\n\nWhere?"), ("Where?\n<image>", f"<image>\n{SENTENCE}\nWhere?"),
        ("<image>Where?", f"<image>\n{SENTENCE}\nWhere?"),
    ):  # fmt: skip
        talk = Conversation((Turn("user", asked), answer, Turn("user", "Why?"), answer), (clip,))
        turns = (Turn("user", written), *talk.turns[1:])
        wanted = encode(dataclasses.replace(talk, turns=turns, images_in_place=True), plain)
        for look in (True, False):
            found = encode(talk, stamped, open_images=look)
            assert found.tokens.tolist() == wanted.tokens.tolist() and found.image_spans == wanted.image_spans
            assert found.learned.tolist() == wanted.learned.tolist() and len(found.images) == (4 if look else 0)
        assert encode(talk, plain).tokens.tolist() != wanted.tokens.tolist()
    asked = encode(question("Where?", [clip]), stamped, reply=True)
    assert asked.tokens.tolist() == encode(question(f"<image>\n{SENTENCE}\n\nWhere?", [clip]), plain, reply=True
                                           ).tokens.tolist()  # fmt: skip


def test_each_of_several_videos_has_its_own_and_pictures_and_letters_have_none(clip, tmp_path):
    other, still = Video(videos.write(tmp_path / "b.avi", videos.moving(2), rate=2)), Image.new("RGB", (8, 8))
    turns = (Turn("user", "A <image>, <image> or <image>?"), Turn("assistant", "Yes."), Turn("user", "<image>"))
    found = time_stamps.stamped(Conversation(turns, (clip, still, other, still), images_in_place=True), STAMPED)
    second = time_stamps.sentence(other, STAMPED)
    assert "lasts for 1.00 seconds, and 2 frames" in second
    assert [turn.text for turn in found.turns] == [
        f"A <image>\n{SENTENCE}\n, <image> or <image>\n{second}\n?", "Yes.", "<image>"]  # fmt: skip
    for talk in (Conversation(turns[:1], (still,)), Conversation((Turn("user", "the letters <image>"),))):
        assert time_stamps.stamped(talk, STAMPED) is talk


def test_frames_without_times_are_refused_by_id(tmp_path):
    videos.write_folder(tmp_path / "frames", videos.moving(3))
    talk = Conversation((Turn("user", "<image>\nWhere?"), Turn("assistant", "A")), (Video("frames"),), id="r7")
    for look in (True, False):
        with pytest.raises(UsageError, match="record 'r7': a folder of frames, .* has no times, which prompt.time_"):
            encode(talk, format_of(STAMPED), tmp_path, open_images=look)
    assert encode(talk, format_of(STAMPED, "plain"), tmp_path).tiles == 3  # whose questions hold no word


def test_time_stamps_are_a_part_of_the_rule():
    assert video.rule(8, 0.0, True) == FrameRule(8, time_stamps=True)
    assert video.from_json(video.to_json(STAMPED)) == STAMPED
    assert video.to_json(STAMPED) == {"frames": 4, "fps": 0.0, "time_stamps": True}
    for frames, stamps in ((0, True), (8, 1), (8, None)):
        with pytest.raises(UsageError, match=f"prompt.time_stamps={stamps} with prompt.frames={frames}: want True or"):
            video.rule(frames, 0.0, stamps)
