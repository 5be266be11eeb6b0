"""Videos are asked about: from Python, by `chat`, and as questions of `evaluate`; with pictures and without a rule."""

import dataclasses
import io
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

import llava_jax
from llava_jax import Conversation, Turn, Video, chat
from llava_jax.checkpoint import model_json
from llava_jax.errors import UsageError
from llava_jax.evaluate import __main__ as command
from llava_jax.evaluate import answer
from llava_jax.evaluate.questions import Question
from llava_jax.generate.assistant import Assistant
from llava_jax.prompt.conversation import question
from tests import videos
from tests.generate import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkpoint that reads four frames of a video, a file, a folder of frames and a picture."""
    folder = tmp_path_factory.mktemp("videos")
    tiny.save(folder / "model")
    metadata = model_json.read(folder / "model")
    prompt = model_json.PromptMetadata("v1", False, "pad", False, video={"frames": 4, "fps": 0.0})
    words = model_json.read_tokenizer_files(folder / "model")
    model_json.write(folder / "model", model_json.Metadata(metadata.model, prompt), words)
    videos.write(folder / "clip.mp4", videos.moving(10, seed=2))
    videos.write_folder(folder / "frames", videos.moving(3, seed=9))
    tiny.picture().save(folder / "it.png")
    return folder


@pytest.fixture(scope="module")
def assistant(root):
    return llava_jax.load(root / "model", slots=2)


def test_a_video_is_answered_alone_among_pictures_and_in_a_batch(root, assistant):
    clip, frames = Video(root / "clip.mp4"), Video(root / "frames")
    alone = assistant.generate("What?", [clip], max_new_tokens=6)
    assert "".join(assistant.stream("What?", [clip], max_new_tokens=6)) == alone.text
    opened = Video([Image.fromarray(frame) for frame in videos.moving(3, seed=9)])
    assert assistant.generate("What?", [frames], max_new_tokens=6) == (
        assistant.generate("What?", [opened], max_new_tokens=6))  # fmt: skip
    mixed = assistant.generate("<image>, then <video>?", [root / "it.png", clip], max_new_tokens=6)
    other = assistant.generate("<video>, then <image>?", [clip, root / "it.png"], max_new_tokens=6)
    assert mixed.prompt_tokens == other.prompt_tokens and mixed.ids != other.ids
    talks = [llava_jax.Conversation((Turn("user", "<image>\nWhat?"),), (one,)) for one in (clip, frames)]
    assert [reply.ids for reply in assistant.replies(talks, max_new_tokens=6)] == [
        assistant.reply(talk, max_new_tokens=6).ids for talk in talks
    ]


def test_frames_change_the_score_of_an_answer(root, assistant):
    """Forwards and backwards are two videos."""
    frames = [Image.fromarray(frame) for frame in videos.moving(4)]
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    one, two = assistant.logps([Conversation(turns, (Video(shown),)) for shown in (frames, frames[::-1])])
    assert len(one) == len(two) and np.abs(one - two).max() > 1e-4
    example = assistant.encode(Conversation(turns, (Video("clip.mp4"),)), root)
    assert example.tiles == 4 and example.image_spans[0].length == 4  # of 4 features a frame one is left, no newline


def test_paths_are_relative_to_the_folder_that_is_named(root, assistant):
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    talk = Conversation(turns, (Video("frames"),))
    whole = Conversation(turns, (Video(root / "frames"),))
    np.testing.assert_array_equal(assistant.logps([talk], root)[0], assistant.logps([whole])[0])
    with pytest.raises(UsageError, match="video 'frames': no such file or folder"):
        assistant.logps([talk])


def test_features_of_videos_are_laid_out_as_in_a_prompt(root, assistant):
    found = assistant.image_features([Video(root / "clip.mp4"), root / "it.png", Video(root / "frames")])
    assert [len(one) for one in found] == [4, 4, 3]  # of 4 features a frame one is left, the mean
    frames = [Image.fromarray(frame) for frame in videos.moving(3, seed=9)]
    np.testing.assert_allclose(found[2], assistant.image_features(frames).mean(1), atol=1e-5)


def test_a_model_without_a_rule_refuses_videos(root, assistant):
    blind = Assistant(assistant.model, assistant.params, tiny.wording(assistant.format.template), 1)
    with pytest.raises(UsageError, match="a video, and no rule for its frames: set prompt.frames"):
        blind.generate("What?", [Video(root / "clip.mp4")])


def test_a_checkpoint_with_time_stamps_is_asked_with_them(root, assistant, tmp_path):
    metadata, place = model_json.read(root / "model"), tmp_path / "model"
    place.mkdir()
    (place / "3").symlink_to(root / "model" / "3")
    prompt = dataclasses.replace(metadata.prompt, video={"frames": 4, "fps": 0.0, "time_stamps": True})
    words = model_json.read_tokenizer_files(root / "model")
    model_json.write(place, dataclasses.replace(metadata, prompt=prompt), words)
    stamped, clip = llava_jax.load(place), Video(root / "clip.mp4")
    sentence = ("The video lasts for 0.40 seconds, and 4 frames are uniformly sampled from it. These frames are "
                "located at 0.00s,0.12s,0.24s,0.36s.Please answer the following questions related to this video.")
    wanted = assistant.encode(question(f"<image>\n{sentence}\n\nWhere?", [clip]), reply=True)
    assert stamped.encode(question("Where?", [clip]), reply=True).tokens.tolist() == wanted.tokens.tolist()
    with pytest.raises(UsageError, match="a folder of frames, .* has no times, which prompt.time_stamps=True wants"):
        stamped.generate("Where?", [Video(root / "frames")])


def test_chat_shows_videos(root, assistant, capsys, monkeypatch):
    defaults = ["--checkpoint", str(root / "model"), "--max-new-tokens", "6"]
    asked = ["--image", str(root / "it.png"), "--video", str(root / "clip.mp4"), "--prompt", "What?"]
    assert chat.main([*defaults, *asked]) == 0
    images = [root / "it.png", Video(root / "clip.mp4")]
    assert capsys.readouterr().out == assistant.generate("What?", images, max_new_tokens=6).text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/video {root / 'frames'}\nWhat?\n/video nowhere\n/video\n"))
    assert chat.main(defaults) == 0
    out, err = capsys.readouterr()
    assert out == assistant.generate("What?", [Video(root / "frames")], max_new_tokens=6).text + "\n"
    assert "chat: video 'nowhere': no such file or folder\n" in err and "/video : want a file or a folder" in err
    assert chat.main([*defaults, "--video", "nowhere", "--prompt", "What?"]) == 64


def test_evaluate_asks_about_videos(root, assistant, tmp_path, capsys):
    (tmp_path / "images").symlink_to(root)
    rows = [{"id": "1", "video": "clip.mp4", "question": "What?", "answer": "x"},
            {"id": "2", "video": ["frames"], "image": "it.png", "question": "Which?", "answer": "x"}]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command_line = ["answer", "--benchmark", "custom", "--data", str(tmp_path), "--checkpoint", str(root / "model"),
                    "--max-new-tokens", "6", "--slots", "2", "--out", str(tmp_path / "out.jsonl")]  # fmt: skip
    assert command.main(command_line) == 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    images = [[Video(root / "clip.mp4")], [root / "it.png", Video(root / "frames")]]
    asked = zip(rows, images)
    assert texts == [assistant.generate(row["question"], shown, max_new_tokens=6).text for row, shown in asked]
    (tmp_path / "questions.jsonl").write_text(json.dumps(rows[0] | {"video": "none.mp4"}) + "\n")
    assert command.main([*command_line[:-1], str(tmp_path / "other.jsonl")]) == 65
    assert "missing_image" in capsys.readouterr().err


def test_a_server_is_not_asked_about_a_video(root):
    job = answer.Job(Question("1", "What?", (Video("clip.mp4"),)), 0)
    with pytest.raises(UsageError, match="a video, and OpenAI's protocol has none: ask a checkpoint"):
        answer._request(job, answer.Settings(8), epath.Path(root))
