"""What the keys of a record, of a turn and of a part of a message mean: read, harmless, or refused with a remedy.

A key that stands in no table is unknown: it is counted, and told once. In capitals a key means what it means in small
letters, and is refused where it would be read.
"""

READ, HARMLESS = "read", "harmless"


def _each(names: str, use: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), use)


_PICTURE_KEY = "a picture under this key is not read: rename it to `image`, or to `images` for a list"
_VIDEO_KEY = "a video under this key is not read: rename it to `video`, or to `videos` for a list"
_AUDIO = "audio is not read: write what is said into the text, or drop the record"
_TOOLS = "calls of tools are not trained on: drop them, or write them into the turns' text"
_PREFERENCE = "preferences are not trained on: write the wanted answer as the last turn"
_SYSTEM = "a system text under this key is not read: rename it to `system`"
_HISTORY = "earlier turns under this key are not read: write them as the first turns of `conversations`"
_MARK = "this mark is not read: write `loss` in its place, true for an answer that is learned, else false"
_TURN_PICTURE = "name the pictures in the record's `images`, in the order of their <image>"
_TURN_VIDEO = "name the videos in the record's `videos`, in the order of their <video>"

# What each key is for: READ, HARMLESS (nothing of it is trained on), or the remedy that its refusal names. An empty
# value (null, "", []) counts as no key, as tables write one for every record that lacks it.
RECORD_KEYS = {
    **_each("id image images video videos conversations messages system system_prompt weight", READ),
    **_each("model source data_source dataset dataset_name url license width height category meta metadata split type "
            "task question_id idx index image_id prompt_id lang language topic domain ID Id", HARMLESS),
    **_each("system_message system_text sys_prompt", _SYSTEM),
    **_each("history", _HISTORY),
    **_each("sample_weight loss_weight", "rename it to `weight`"),
    **_each("image_path image_paths image_file image_files image_url image_urls img imgs picture pictures photo photos "
            "frames", _PICTURE_KEY),
    **_each("video_path video_paths video_file video_url video_id", _VIDEO_KEY),
    **_each("audio audios audio_path audio_url speech", _AUDIO),
    **_each("tools functions function_call tool_calls", _TOOLS),
    **_each("chosen rejected chosen_response rejected_response rejected_messages", _PREFERENCE),
}  # fmt: skip
TURN_KEYS = {
    **_each("from value role content loss train weight", READ),
    **_each("id name index timestamp turn_id", HARMLESS),
    **_each("image images image_path image_url img picture", _TURN_PICTURE),
    **_each("video videos video_path", _TURN_VIDEO),
    **_each("audio audios", _AUDIO),
    **_each("tools functions function_call tool_calls tool_call_id", _TOOLS),
    **_each("reasoning_content thinking", "it is not part of any template: write it into the answer, or drop it"),
    **_each("mask masked loss_mask learn trainable supervised ignore", _MARK),
    **_each("train_detail training_detail loss_scale", "a turn is learned whole or not at all: `loss` true or false"),
}
PART_KEYS = {**_each("type text image image_url video video_url path url index", READ), **_each("detail", HARMLESS)}
