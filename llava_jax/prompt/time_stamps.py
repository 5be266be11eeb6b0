"""Time stamps: the sentence of LLaVA-Video's prompts that says how long a video lasts and when its frames are."""

from dataclasses import replace

from etils import epath

from llava_jax.errors import UsageError
from llava_jax.prompt import video
from llava_jax.prompt.conversation import IMAGE_MARKER, Conversation, Video
from llava_jax.prompt.video import FrameRule


def stamped(conversation: Conversation, rule: FrameRule, root: epath.PathLike | None = None) -> Conversation:
    """The conversation with a line of `sentence` behind the marker of each video.

        "<image>\\nWhere?" -> "<image>\\nThe video lasts for 2.00 seconds, and ... related to this video.\\n\\nWhere?"

    Source: LLaVA-NeXT llava/train/train.py `_get_item`@df17966, which knows one video, shown first. Differs from
    LLaVA-NeXT: its playground/demo/video_demo.py asks with one line end less before the question than it trains with.

    Args:
      root: the folder that paths are relative to and may not leave.

    Raises:
      ValueError: a video cannot be read, or nothing says its times; names the record.
    """
    if not any(isinstance(one, Video) for one in conversation.images):
        return conversation
    try:
        found = [sentence(one, rule, root) + "\n" if isinstance(one, Video) else None for one in conversation.images]
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"record {conversation.id!r}: {error}") from error
    turns, lines = [], iter(found)
    for turn in conversation.turns:
        before, *behind = turn.text.split(IMAGE_MARKER)
        if behind and not conversation.images_in_place:  # its markers become one, at the front
            before, behind = "", ["".join((before, *behind))]
        parts = [text if line is None else f"\n{line}{text}" for text, line in zip(behind, lines)]
        turns.append(replace(turn, text=IMAGE_MARKER.join((before, *parts, *behind[len(parts) :]))))
    return replace(conversation, turns=tuple(turns))


def sentence(clip: Video, rule: FrameRule, root: epath.PathLike | None = None) -> str:
    """When a video's frames are, in seconds, and how long it lasts.

    Source: LLaVA-NeXT llava/train/train.py (add_time_instruction), llava/utils.py process_video_with_decord@df17966.
    Differs from LLaVA-NeXT: with another `fps` than 1 the times are seconds too, where it numbers the frames; a folder
    has no times, where it takes two frames a second for one whose path holds "shareVideoGPTV".

    Raises:
      ValueError, FileNotFoundError: as `video.frames`; nothing says the times.
    """
    total, rate, _ = video.measure(clip, root)
    if rate is None:
        raise UsageError("a folder of frames, or a file without a frame rate, has no times, which prompt.time_stamps="
                         "True wants: encode it as a file with a rate, or set prompt.time_stamps=False")  # fmt: skip
    chosen, step = video.indices(total, rate, rule), video.step(rate, rule)
    # Every n-th frame counts as exactly 1 / fps seconds after the last, of a video of 29.97 a second too.
    nominal = rule.fps > 0 and round(rate / rule.fps) > 0 and chosen == list(range(0, total, step))
    a_second = step * rule.fps if nominal else rate
    times = ",".join(f"{i / a_second:.2f}s" for i in chosen)
    return (f"The video lasts for {total / rate:.2f} seconds, and {len(chosen)} frames are uniformly sampled from it. "
            f"These frames are located at {times}.Please answer the following questions related to this video.")
