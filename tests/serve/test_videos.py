"""Videos of messages: what `Assistant` answers, what is refused and by which field, and how little a bad one costs."""

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from llava_jax.generate.assistant import Assistant
from llava_jax.prompt import time_stamps
from llava_jax.prompt.conversation import Conversation, Turn, Video
from llava_jax.prompt.encode import encode
from llava_jax.prompt.video import FrameRule
from llava_jax.serve import decoder, messages
from llava_jax.serve import videos as of_messages
from llava_jax.serve.fields import Refused
from tests import videos
from tests.generate import tiny
from tests.serve.browser import CHROMIUM, page
from tests.serve.running import part, running, user

NEW = 8
FORMAT = dataclasses.replace(tiny.assistant().format, video=FrameRule(4))


@pytest.fixture(scope="module")
def assistant():
    return Assistant(tiny.assistant().model, tiny.weights(), FORMAT, 1)


@pytest.fixture(scope="module")
def served(assistant):
    with running(slots=2, assistant=dataclasses.replace(assistant, slots=2)) as one:
        yield one


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A file of 10 frames, 64 x 48 pixels."""
    return videos.write(tmp_path_factory.mktemp("clip") / "a.mp4", videos.moving(10, seed=2)).read_bytes()


def shown(content: bytes, kind: str = "video/mp4") -> dict:
    return {"type": "video_url", "video_url": {"url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}}


def ask(served, *parts, **fields):
    found = served.chat({"messages": [user(*parts)], "max_tokens": NEW, "temperature": 0, "return_token_ids": True}
                        | fields).json()  # fmt: skip
    return found["choices"][0]["token_ids"], found["prompt_token_ids"]


def test_a_video_is_answered_as_by_the_assistant(served, assistant, clip):
    wanted = assistant.generate("Where?", [Video(clip)], max_new_tokens=NEW)
    talk = Conversation((Turn("user", "<image>\nWhere?"),), (Video(clip),))
    ids = encode(talk, FORMAT, reply=True).tokens.tolist()
    for parts in ((shown(clip), "Where?"), ("Where?", shown(clip)), (shown(clip, "video/x;codecs=a,b"), "Where?")):
        assert ask(served, *parts) == (list(wanted.ids), ids)
    (still,) = [assistant.generate("Where?", [tiny.picture()], max_new_tokens=NEW)]
    assert still.ids != wanted.ids
    parts = served.post("/v1/prompt", {"messages": [user(shown(clip), "Where?")]}).json()
    assert parts["ids"] == ids and [one["image"]["length"] for one in parts["parts"] if "image" in one] == [4]


def test_videos_and_pictures_stand_in_place(served, assistant, clip):
    frames = videos.moving(3, seed=9)
    files = []
    for frame in frames:
        out = io.BytesIO()
        Image.fromarray(frame).save(out, "JPEG")
        files.append(out.getvalue())
    as_pictures = {"type": "video_url", "video_url": {
        "url": "data:video/jpeg;base64," + ",".join(base64.b64encode(one).decode() for one in files)}}  # fmt: skip
    turns = (Turn("user", "First\n<image>\nthen\n<image>\nor\n<image>"),)
    talk = Conversation(turns, (tiny.picture(), Video(clip), Video(tuple(files))), images_in_place=True)
    found = ask(served, "First", part(), "then", shown(clip), "or", as_pictures)
    assert found == (list(assistant.reply(talk, NEW).ids), encode(talk, FORMAT, reply=True).tokens.tolist())
    swapped = ask(served, "First", part(), "then", as_pictures, "or", shown(clip))
    assert sorted(swapped[1]) == sorted(found[1]) and swapped[0] != found[0]


def test_the_list_of_models_says_whether_they_read_videos(served):
    assert served.client().models.retrieve("llava-jax").input_modalities == ["text", "image", "video"]


def test_a_video_with_time_stamps_has_the_prompt_of_the_assistant(clip):
    format = dataclasses.replace(FORMAT, video=FrameRule(4, 5.0, True))
    talk = Conversation((Turn("user", "<image>\nWhere?"),), (Video(clip),))
    chat = messages.opened(messages.read([user(shown(clip), "Where?")]), format)
    wanted = encode(talk, format, reply=True)
    assert messages.length(chat, format, 512) == len(wanted.tokens) > len(encode(talk, FORMAT, reply=True).tokens)
    found = messages.prompt(chat, format)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    np.testing.assert_array_equal(found.images[0].tiles, wanted.images)
    assert "at 0.00s,0.20s.Please" in time_stamps.sentence(chat.conversation.images[0], format.video)


@pytest.mark.parametrize("mode", ["square", "pad", "squash"])
def test_frames_of_another_process_have_the_pixels_of_this_one(clip, mode):
    format = dataclasses.replace(FORMAT, image_mode=mode)
    talk = Conversation((Turn("user", "<image>\nWhere?"),), (Video(clip),))
    found = dataclasses.replace(talk, images=(of_messages.opened(Video(clip), format, "", time.monotonic() + 60),))
    np.testing.assert_array_equal(encode(found, format, reply=True).images, encode(talk, format, reply=True).images)


def huge(tmp_path) -> bytes:
    return videos.write(tmp_path / "huge.avi", [np.zeros((4096, 4096, 3), np.uint8)]).read_bytes()


def test_what_is_no_video_is_a_400_that_names_the_field(served, clip, tmp_path):
    url = "messages[0].content[1].video_url.url"
    late = videos.write(tmp_path / "a.ts", videos.moving(50)).read_bytes()[20 * 188 :]
    good = {"type": "text", "text": "Hello"}
    for wrong, field, message in (
        ({"type": "video_url"}, url[:-4], "want an object such as"),
        ({"type": "video_url", "video_url": "a"}, url[:-4], "want an object such as"),
        ({"type": "video_url", "video_url": {"url": 5}}, url[:-4], "want an object such as"),
        ({"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}, url, "fetches no videos"),
        ({"type": "video_url", "video_url": {"url": "file:///a.mp4"}}, url, "fetches no videos"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,%%"}}, url, "its base64 is damaged"),
        (shown(clip, "image/png"), url, "a data: URL of a video"),
        (shown(b""), url, "no video, or a damaged one"), (shown(b"no video"), url, "no video, or a damaged one"),
        (shown(clip[:900]), url, "no video, or a damaged one"), (shown(late), url, "of its 41 frames can be decoded"),
        (shown(huge(tmp_path)), url, "1 frames of 16,777,216 pixels, want at most 16,000,000 a frame"),
        (shown(b"", "video/jpeg"), url, "not a picture that can be read"),
    ):  # fmt: skip
        found = served.chat({"messages": [user("What?", wrong)], "max_tokens": 1})
        error = found.json()["error"]
        assert (found.status_code, error["type"], error["param"]) == (400, "invalid_request_error", field), error
        assert message in error["message"], error
    answer = served.chat({"messages": [{"role": "assistant", "content": [shown(clip)]}]}).json()["error"]
    assert answer["param"] == "messages[0].content[0]"
    two = served.chat({"messages": [user(part(), shown(clip), shown(b"x"))], "max_tokens": 1}).json()["error"]
    assert two["param"] == "messages[0].content[2].video_url.url"
    assert served.chat({"messages": [user(good, shown(clip))], "max_tokens": 1}).status_code == 200
    assert served.idle()


def test_a_model_without_a_rule_refuses_videos(clip):
    chat = messages.read([user(shown(clip), "Where?")])
    with pytest.raises(Refused, match="this model reads no videos: ask one that was trained with prompt") as error:
        messages.opened(chat, tiny.assistant().format)
    assert error.value.field == "messages[0].content[0].video_url.url" and error.value.status == 400


def test_videos_that_take_too_long_are_given_up_together(clip, monkeypatch):
    monkeypatch.setattr(of_messages, "DECODE_SECS", 2.0)
    start = time.monotonic()
    with pytest.raises(Refused, match="decoding the videos takes more than 2 s: .* or show fewer"):
        messages.opened(messages.read([user(*[shown(clip)] * 300)]), FORMAT)
    assert time.monotonic() - start < 12


LITTLE = """
import resource
from llava_jax.serve import decoder
from llava_jax.prompt import images
import av
pages = int(open("/proc/self/statm").read().split()[0])
decoder.MAX_BYTES = pages * resource.getpagesize() + 64 * 2**20
decoder.main()
"""


def test_decoding_takes_no_more_memory_than_it_may(tmp_path):
    large = videos.write(tmp_path / "large.avi", [np.zeros((3900, 3900, 3), np.uint8)]).read_bytes()
    options = {"frames": 4, "fps": 0.0, "size": 28, "mode": "pad", "mean": [0.0] * 3, "resample": "bicubic"}
    child = [sys.executable, "-c", LITTLE, json.dumps(options)]
    found = subprocess.run(child, input=large, capture_output=True, timeout=60)
    assert found.returncode == 0, found.stderr[-2000:]
    error = json.loads(found.stdout)["error"]
    assert "allocate memory" in error or "takes more than" in error


def test_too_many_pixels_in_all_frames_are_refused(clip, monkeypatch):
    monkeypatch.setattr(decoder, "MAX_ALL_PIXELS", 64 * 48 * 10 - 1)
    with pytest.raises(ValueError, match="10 frames of 3,072 pixels, want at most .* 30,719 in all frames: shorten"):
        decoder.decoded(clip, 4, 0.0, 28, "pad", [0.0] * 3, "bicubic")


def test_without_pyav_a_video_names_the_extra(clip, tmp_path, monkeypatch):
    (tmp_path / "av.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(Refused, match=r"messages.0.: .*`pip install av` .the extra `video`."):
        of_messages.opened(Video(clip), FORMAT, "messages[0]", time.monotonic() + 60)


DROP = """(() => {
  const bytes = Uint8Array.from(atob(%s), letter => letter.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "a.mp4", { type: "video/mp4" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true, bubbles: true }));
})()"""


@pytest.mark.skipif(CHROMIUM is None, reason="wants chromium")
def test_the_page_takes_a_video(served, clip, tmp_path):
    with page(1366, 800) as one:
        one.open(served.url)
        one.wait("videos === true")
        one.run(DROP % json.dumps(base64.b64encode(clip).decode()))
        one.wait("document.querySelectorAll('#chosen video').length === 1")
        one.run(f"$('max_tokens').value = {NEW}; $('text').value = 'Where?'; $('send').click()")
        one.wait("turns.length === 2 && turns[1].usage && !running")
        body = {"messages": one.run("messages(1)"), "max_tokens": NEW, "temperature": 0}
        assert body["messages"][0]["content"][0] == shown(clip)
        assert one.run("turns[1].text") == served.chat(body).json()["choices"][0]["message"]["content"]
        assert one.run("document.querySelectorAll('.user video').length") == 1
        one.screen(tmp_path / "video.png")
        assert one.errors == []
