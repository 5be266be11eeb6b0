"""Conversation templates as data: which text stands around a message, and which of it the model learns to write.

The strings are facts of the formats that released checkpoints were trained on.
Source: haotian-liu/LLaVA llava/conversation.py and llava/train/train.py @ c121f04 (Apache-2.0), the format data only;
where another project is the source, it stands beside the template.
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from llava_jax.errors import UsageError
from llava_jax.prompt.conversation import Turn

_MARK = re.compile(r"</?s>|</?think>|<\|\w+\|>")


class Part(NamedTuple):
    """A fixed piece of text; learned: the model is trained to write it."""

    text: str
    learned: bool = False


class Frame(NamedTuple):
    """What stands before and after a message.

    before[0] alone opens a turn that has no message yet: for the assistant it is where generation starts.
    """

    before: tuple[Part, ...]
    after: tuple[Part, ...]


@dataclass(frozen=True)
class Template:
    """One format.

        system_frame[0] system system_frame[1] | user.before m user.after | assistant.before m assistant.after | ...

    system: the default text; with an empty one its frame is left out too, unless `system_kept`.
    stops: strings that end a reply; the tokenizer's eos always does.
    between: text before every user turn but the first.
    ending: text after the last turn.
    system_inside: the system frame stands inside the first user turn, right before its message.
    alternates: turns are user, assistant, user, ...; a first turn from the assistant is dropped.
    open_when_empty: an empty message leaves its turn open, as LLaVA's `if message:` does.
    images_only: of the user's message only the images are kept (LLaVA's first stage).
    image_frame: what stands around each image.
    image_joint: text between a turn's one image and its words.
    reply_apart: what the assistant says is made into tokens by itself, not together with the text before it.
    reply_opening: text between assistant.before and a reply, and before the last answer; not before earlier ones.
    system_kept: its frame stands there with an empty system text too.
    trims: white space at either end of a message or of the system text is left out.
    examples: turns that stand before the conversation and are never learned.
    """

    name: str
    system: str
    system_frame: tuple[str, str]
    user: Frame
    assistant: Frame
    stops: tuple[str, ...]
    between: str = ""
    ending: tuple[Part, ...] = ()
    system_inside: bool = False
    alternates: bool = True
    open_when_empty: bool = True
    images_only: bool = False
    image_frame: tuple[str, str] = ("", "")
    image_joint: str = "\n"
    reply_apart: bool = False
    reply_opening: str = ""
    system_kept: bool = False
    trims: bool = False
    examples: tuple[Turn, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts in it that are one token each for the models it was made for, such as "</s>"."""
        parts = (*self.user.before, *self.user.after, *self.assistant.before, *self.assistant.after, *self.ending)
        frames = (*self.system_frame, *self.image_frame, self.between, self.reply_opening)
        texts = (*(part.text for part in parts), *frames, *self.stops)
        return tuple(sorted({mark for text in texts for mark in _MARK.findall(text)}))


_POLITE_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_POLITE_USER = _POLITE_HUMAN.replace("human", "user")
_VISUAL_CONTENT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language."  # the missing space is the reference's
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_SAFETY = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_VISION_ASSISTANT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_LLM_ASSISTANT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_RENEWABLE = (
    Turn("user", "What are the key differences between renewable and non-renewable energy sources?"),
    Turn(
        "assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively "
        "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
        "Non-renewable energy sources, on the other hand, are finite and will eventually be "
        "depleted, such as coal, oil, and natural gas. Here are some key differences between "
        "renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
        "energy sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
        "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
        "and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
        "have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
        "locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
        "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
        "non-renewable sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)

_IMAGE_CONTENT = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)

_MMTAG = ("<Image>", "</Image>")
_IMG = ("<Img>", "</Img>")

# The model learns every "###", the assistant's name, its answer and the newline: that is how it learns to stop.
# Differs from LLaVA: a reply starts from this same text; LLaVA serves "###Human: ...###Assistant:", which it never
# trained on.
_V0 = Template(
    name="llava_v0",
    system=_POLITE_HUMAN,
    system_frame=("", "\n\n"),
    user=Frame((Part("###", True), Part(" Human: ")), (Part("\n"),)),
    assistant=Frame((Part("### Assistant:", True), Part(" ", True)), (Part("\n", True),)),
    stops=("###",),
    ending=(Part("### ", True),),
    alternates=False,
    open_when_empty=False,
)
_V1 = Template(
    name="v1",
    system=_POLITE_USER,
    system_frame=("", " "),
    user=Frame((Part("USER:"), Part(" ")), (Part(" "),)),
    assistant=Frame((Part("ASSISTANT:"), Part(" ", True)), (Part("</s>", True),)),
    stops=("</s>",),
)
_LLAMA_2 = Template(
    name="llama_2",
    system=_SAFETY,
    system_frame=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    user=Frame((Part(""), Part("[INST] ")), (Part(" [/INST]"),)),
    assistant=Frame((Part(""), Part(" ", True)), (Part(" </s>", True),)),
    stops=("</s>",),
    between="<s>",
    system_inside=True,
)
_MPT = Template(
    name="mpt",
    system=_LLM_ASSISTANT,
    system_frame=("<|im_start|>system\n", "<|im_end|>"),
    user=Frame((Part("<|im_start|>user\n"),), (Part("<|im_end|>"),)),
    assistant=Frame((Part("<|im_start|>assistant\n"),), (Part("<|im_end|>", True),)),
    stops=("<|im_end|>",),
)
_PLAIN = Template(
    name="plain",
    system="",
    system_frame=("", ""),
    user=Frame((Part(""),), ()),
    assistant=Frame((Part(""),), (Part("\n", True),)),
    stops=("\n",),
    open_when_empty=False,
    images_only=True,
)
# MiniGPT-4's second stage knows no system text; its chat has one, and no space before "###". Both are the format.
# Source: Vision-CAIR/MiniGPT-4 minigpt4/models/minigpt_base.py, conversation/conversation.py @ d94738a (BSD-3).
_MINIGPT4 = Template(
    name="minigpt4",
    system="",
    system_frame=("", "###"),
    user=Frame((Part("Human: "),), (Part(" "),)),
    assistant=Frame((Part("###Assistant: "),), (Part("###", True),)),
    stops=("###",),
    image_frame=_IMG,
    image_joint=" ",
    reply_apart=True,
    system_kept=True,
)
_MINIGPT4_CHAT = replace(
    _MINIGPT4,
    name="minigpt4_chat",
    system=_IMAGE_CONTENT,
    user=Frame((Part("Human: "),), (Part("###"),)),
    assistant=Frame((Part("Assistant: "),), (Part("###", True),)),
    reply_apart=False,
    system_kept=False,
)
_MINIGPT4_LLAMA_2 = replace(
    _MINIGPT4,
    name="minigpt4_llama_2",
    system_frame=("", "<s>"),
    user=Frame((Part("[INST] "),), (Part(" "),)),
    assistant=Frame((Part("[/INST] "),), (Part("</s>", True),)),
    stops=("</s>",),
    between="<s>",
    system_kept=False,
)
# As its training but for one space: there two stand before "[/INST]", in its chat and for its published scores one.
# Differs from MiniGPT-v2: its chat begins with two "<s>" and joins earlier answers without their "</s>", on neither
# of which it was trained. A task's mark, such as "[vqa]" or "[refer]", is the beginning of the question.
_MINIGPTV2 = replace(_MINIGPT4_LLAMA_2, name="minigptv2", assistant=Frame((Part("[/INST]"),), (Part("</s>", True),)))
# What follows is what the chat templates in the models' own tokenizer_config.json write.
# Source: meta-llama/Meta-Llama-3-8B-Instruct. It strips every message.
_LLAMA_3 = Template(
    name="llama_3",
    system="",
    system_frame=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=Frame((Part("<|start_header_id|>user<|end_header_id|>\n\n"),), (Part("<|eot_id|>"),)),
    assistant=Frame((Part("<|start_header_id|>assistant<|end_header_id|>\n\n"),), (Part("<|eot_id|>", True),)),
    stops=("<|eot_id|>",),
    open_when_empty=False,
    trims=True,
)
# Source: Qwen/Qwen2.5-7B-Instruct; Qwen2-7B-Instruct and Qwen3-8B differ as their lines below say. LLaVA-NeXT's
# qwen_1_5 is Qwen2's with other labels: it supervises the headers and the newlines too.
_QWEN = Template(
    name="qwen",
    system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    system_frame=("<|im_start|>system\n", "<|im_end|>\n"),
    user=Frame((Part("<|im_start|>user\n"),), (Part("<|im_end|>\n"),)),
    assistant=Frame((Part("<|im_start|>assistant\n"),), (Part("<|im_end|>", True), Part("\n"))),
    stops=("<|im_end|>",),
    open_when_empty=False,
)
# Source: mistralai/Mistral-7B-Instruct-v0.2, the version that knows a system text and whose tokenizer has `legacy`
# false. mistral_instruct is LLaVA-1.6's on the same model: it writes a space before "</s>" and none behind it.
_MISTRAL = Template(
    name="mistral",
    system="",
    system_frame=("", "\n\n"),
    user=Frame((Part("[INST] "),), (Part(" [/INST]"),)),
    assistant=Frame((Part(""), Part(" ", True)), (Part("</s>", True),)),
    stops=("</s>",),
    between=" ",
    system_inside=True,
    open_when_empty=False,
)

TEMPLATES = {
    template.name: template
    for template in (
        replace(_V0, name="v0", examples=_RENEWABLE),
        _V0,
        replace(_V0, name="v0_mmtag", system=_VISUAL_CONTENT, image_frame=_MMTAG),
        _V1,
        replace(_V1, name="llava_v1", system=_POLITE_HUMAN),
        replace(_V1, name="v1_mmtag", system=_VISUAL_CONTENT, image_frame=_MMTAG),
        _LLAMA_2,
        replace(_LLAMA_2, name="llava_llama_2", system=_VISION_ASSISTANT),
        replace(_LLAMA_2, name="mistral_instruct", system="", between=""),
        _MPT,
        replace(_MPT, name="chatml_direct", system="Answer the questions."),
        _PLAIN,
        _MINIGPT4,
        _MINIGPT4_CHAT,
        _MINIGPT4_LLAMA_2,
        # Differs from MiniGPT-4: its chat leaves the "</s>" behind earlier answers out, which the model did write.
        replace(_MINIGPT4_LLAMA_2, name="minigpt4_llama_2_chat", system=_IMAGE_CONTENT, reply_apart=False),
        _MINIGPTV2,
        _LLAMA_3,
        _QWEN,
        replace(_QWEN, name="qwen_2", system="You are a helpful assistant."),
        # As with enable_thinking=False.
        replace(_QWEN, name="qwen_3", system="", reply_opening="<think>\n\n</think>\n\n"),
        _MISTRAL,
    )
}
# LLaVA-NeXT's names (llava/conversation.py), and the template that writes the same frames.
_ALSO = {
    "llava_llama_3": "llama_3", "qwen_1_5": "qwen_2", "qwen_2_5": "qwen", "llava_mistral_instruct": "mistral_instruct",
}  # fmt: skip


def get(name: str) -> Template:
    """The template of that name.

    Raises:
      ValueError: no template has that name; the message lists all and the nearest.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    near = [_ALSO[name]] if name in _ALSO else difflib.get_close_matches(name, TEMPLATES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"template {name!r} is unknown: {hint}choose one of {', '.join(TEMPLATES)}")
