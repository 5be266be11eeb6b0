"""README.md of what `export` writes: what it is, how to load it, how to write a prompt for it."""

import json
import re

from llava_jax.checkpoint.model_json import PromptMetadata
from llava_jax.models import registry
from llava_jax.models.presets import LlavaConfig
from llava_jax.prompt import anyres, ending, templates
from llava_jax.prompt.tokenizer import HubTokenizer, Tokenizer

_HUB = """# {name}

A LLaVA exported by llava_jax: {model}.

```python
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```

Images: {images}. The PIL image processor makes the very pixels of training:
`processor.image_processor = AutoImageProcessor.from_pretrained("{name}", backend="pil")`.
{pictures}
{ending}
{prompt}
"""

_BLIP2 = """# {name}

A MiniGPT-4 exported by llava_jax as a BLIP-2 with a LLaMA: {model}.

```python
from transformers import AutoTokenizer, Blip2ForConditionalGeneration
model = Blip2ForConditionalGeneration.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Images: {images}.
{pictures}
{ending}
Prompts: `Blip2Processor` puts the image before `<s>`, where this model has never seen it. Write the ids yourself as
`{template}` has them: `<s>`, the text before the image, {queries} times `<image>`, the text after it, each text made
into tokens apart. The norm after the tower has an eps of 1e-6 in transformers; it was trained with 1e-5.
"""

# Source: transformers 5.24 image_transforms (transparency on white) and image_utils.load_image (EXIF); Pillow 13.0.0.
_PICTURES = """
In training transparency was dropped, so the colours under it showed, and pictures were not turned by their EXIF mark.
transformers puts transparent pictures on white, and its `load_image` turns them: give the processor
`PIL.Image.open(file).convert("RGB")` for what the model was trained on.
"""
_PASSES = """
Training resized rows before columns, as Pillow up to 12 does; from 13 on it begins with the columns of many upright
pictures, which changes some pixels by a few levels: `pip install "pillow<13"` for the very pixels.
"""
_STAMPS = """
Questions about videos were trained with times, which no chat template writes: begin the text behind the video with "The
video lasts for 2.00 seconds, and 4 frames are uniformly sampled from it. These frames are located at
0.00s,0.64s,1.28s,1.96s.Please answer the following questions related to this video.", all on one line, and an empty
line.
"""
_TEXTS = """
Answers end with {texts}, which is no token: say `model.generate(..., tokenizer=processor.tokenizer)`, which stops there
(`stop_strings` in generation_config.json).
"""
_CHAT = """Prompts: the chat template writes what the model was trained on (`{template}`), with the
token that begins a text where the model has one:

```python
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
```

With `processor(text=...)` on a text that the template made, say `add_special_tokens=False`, or that token
stands twice."""

_NO_CHAT = """Prompts: there is no chat template, because `{template}` {reason} cannot be written as one.
Build the token ids with `llava_jax.prompt`, or write the prompt by hand as the original code does
(llava/conversation.py, `{template}`)."""

_ORIGINAL = """# {name}

A LLaVA exported by llava_jax in the format of the original code: {model}.

Conversation template: `{template}`. Images: {images}.

{readers}{rename} {tower}
"""
_GGUF = """# {name}

A LLaVA exported by llava_jax for llama.cpp: {model}. `model-{kind}.gguf` has the language model, its tokenizer and its
chat template (`{template}`), `mmproj-{kind}.gguf` the vision tower and the projector.

```sh
llama-server -m {name}/model-{kind}.gguf --mmproj {name}/mmproj-{kind}.gguf
```

Prompts have the ids of training. Pictures are not all seen as in training (llama.cpp of xllamacpp 2026.10.11549):

{notes}
{stops}"""
# Measured on xllamacpp 2026.10.11549, by the log-probabilities of its answers.
_RESIZED = """\
- It resizes a picture and pads it then; training padded first. Square pictures are the same; of others the edges differ
  (640 x 427 at 336 pixels: a quarter of the pixels, one in twenty by more than 8 of 255 levels)."""
_CLASS_TOKEN = """\
- It puts CLIP's class token behind the patches, so that every position is off by one and the first patch is lost
  (ggml-org/llama.cpp#25814; #25844, which mends it, was open): answers about pictures are worse than the model's."""
_GREY = """\
- It pads with CLIP's mean colour and resizes bicubically; training padded with {mean}, {resample}."""
_NFC = "- It does not compose the characters of a text, as this tokenizer does (NFC): send composed text."
_CODE = {  # repository -> the decoders that it has
    "haotian-liu/LLaVA": ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"),
    "LLaVA-NeXT": ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaQwenForCausalLM"),
}
_UNREAD = """Only llava_jax reads it (`python -m llava_jax.convert import`): neither haotian-liu/LLaVA nor LLaVA-NeXT
has such a tower, connector and decoder together."""
_ADAPTER = """# {name}

A LoRA adapter exported by llava_jax, for {base}.

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({place})
model = PeftModel.from_pretrained(model, "{name}")
```

{rest}
"""
_WITH_PROJECTOR = """The projector was trained whole and lies in the adapter too (`modules_to_save`), which vLLM
refuses: for vLLM export with `--split-projector`."""
_TEXT = """It adapts linear layers alone. vLLM takes it with `--enable-lora --max-lora-rank {rank}`."""
_IMAGES = {
    "pad": "padded to a square, then resized",
    "square": "resized by the shorter side, then cropped in the middle",
    "squash": "resized to a square, whatever their aspect",
    "anyres": "the whole resized to a square, then in tiles of its own resolution",
}


def hub(config: LlavaConfig, prompt: PromptMetadata, name: str, chat: bool) -> str:
    """README.md of the Hugging Face format; chat: there is a chat template."""
    reason = "with marks around images" if prompt.image_start_end else "has parts that"
    text = _CHAT if chat else _NO_CHAT
    words = text.format(template=prompt.template, reason=reason)
    stamps = _STAMPS if prompt.video and prompt.video.get("time_stamps") else ""
    return _HUB.format(
        name=name, model=_model(config), images=_IMAGES[prompt.image_mode], prompt=words,
        pictures=_pictures(prompt.image_mode) + stamps, ending=_ending(prompt.template),
    )  # fmt: skip


def blip2(config: LlavaConfig, prompt: PromptMetadata, name: str) -> str:
    """README.md of a BLIP-2 directory."""
    return _BLIP2.format(
        name=name, model=_model(config), images=_IMAGES[prompt.image_mode], queries=config.image_features,
        template=prompt.template, pictures=_pictures(prompt.image_mode), ending=_ending(prompt.template),
    )  # fmt: skip


def gguf(words: Tokenizer, config: LlavaConfig, prompt: PromptMetadata, name: str, kind: str) -> str:
    """README.md of the two files for llama.cpp."""
    texts = ", ".join(map(repr, ending.of(templates.get(prompt.template), words).texts))
    stops = f"\nAnswers end with {texts}, which is no token: send it as `stop` with every request.\n" if texts else ""
    vision, mean = config.vision, tuple(int(255 * x) for x in config.vision.mean)
    grey = (mean, vision.resample) != ((122, 116, 104), "bicubic")
    notes = [_RESIZED, *([_CLASS_TOKEN] if registry.tower_of(vision).class_token else []),
             *([_GREY.format(mean=mean, resample=vision.resample)] if grey else []),
             *([_NFC] if isinstance(words, HubTokenizer) and '"NFC"' in words.content else [])]  # fmt: skip
    return _GGUF.format(name=name, model=_model(config), template=prompt.template, kind=kind, stops=stops,
                        notes="\n".join(notes))  # fmt: skip


def original(config: LlavaConfig, prompt: PromptMetadata, name: str, tower: str | None) -> str:
    """README.md of the original format; tower: its name on the hub, None where it lies in a directory beside."""
    where = f"The vision tower's weights are in the files; its sizes come from `{tower}`."
    if tower is None:
        where = (
            "The vision tower lies in `vision_tower/`. `mm_vision_tower` in config.json holds its absolute path, the "
            "only form that the original code takes: change it when this directory moves."
        )
    return _ORIGINAL.format(
        name=name, model=_model(config), template=prompt.template, images=_IMAGES[prompt.image_mode], tower=where,
        readers=_readers(config, prompt, tower), rename=_rename(config, name),
    )  # fmt: skip


def _rename(config: LlavaConfig, name: str) -> str:
    """What the directory's name lacks: the original code chooses a decoder's class by words in it.

    Source: llava/model/builder.py of LLaVA@c121f04 and of LLaVA-NeXT@df17966.
    """
    words = {kind: part.original[1].removeprefix("llava").strip("_") for kind, part in registry.decoders().items()}
    own = words[registry.decoder_of(config.llm).kind]
    others = [word for word in words.values() if word and word not in own and word in name.lower()]
    if own in name.lower() and not others:
        return ""
    wish = f"without {others[0]!r}, which is of another language model" if others else f"with {own!r} in it"
    return f" That code chooses a model's class by the directory's name: give it one {wish}."


def _readers(config: LlavaConfig, prompt: PromptMetadata, name: str | None) -> str:
    """Which original code loads a model whose tower it fetches by `name`, None: by its path.

    It takes what lies at a path for a CLIP. LLaVA-NeXT fetches a SigLIP by its name, wants 729 features and always has
    those before the last layer. Mistral and Qwen forget there how a rope was scaled.

    Source: llava/model/{multimodal_encoder,multimodal_projector,language_model} of LLaVA@c121f04, LLaVA-NeXT@df17966.
    """
    vision, (decoder, _) = config.vision, registry.decoder_of(config.llm).original
    readers = [code for code, classes in _CODE.items() if decoder in classes]
    part, tiles = registry.tower_of(vision), anyres.from_json(prompt.image_mode, prompt.tiling)
    if tiles is not None and (tiles.max_tiles or not tiles.several):  # LLaVA knows no limit, and tiles every picture
        readers = [code for code in readers if code == "LLaVA-NeXT"]
    if part.hub_class != "CLIPVisionModel":
        fits = name is not None and vision.features == 729 and vision.run_layers == part.hub[name].layers - 1
        readers = [code for code in readers if fits and code == "LLaVA-NeXT"]
    scaled = config.llm.rope_scaling is not None and decoder != "LlavaLlamaForCausalLM"
    if scaled or not re.fullmatch(r"linear|identity|mlp\d+x_gelu", config.projector):
        readers = []
    return f"Read by {' and '.join(readers)}." if readers else _UNREAD


def adapter(name: str, base: str | None, projector: bool, rank: int) -> str:
    """README.md of an adapter.

    Args:
      base: the directory or the name of its model, where it is known.
      projector: it holds one.
      rank: the largest.
    """
    rest = _WITH_PROJECTOR if projector else _TEXT.format(rank=rank)
    shown, place = (f"`{base}`", f'"{base}"') if base else ("the model that it was trained on", '"..."')
    return _ADAPTER.format(name=name, base=shown, place=place, rest=rest)


def _pictures(mode: str) -> str:
    return _PICTURES + ("" if mode == "pad" else _PASSES)  # a square has no more rows than columns


def _ending(template: str) -> str:
    """What to do where an answer ends with a text."""
    stops, marks = templates.get(template).stops, templates.get(template).marks
    texts = " or ".join(json.dumps(stop) for stop in stops if stop not in marks)
    return _TEXTS.format(texts=texts) if texts else ""


def _model(config: LlavaConfig) -> str:
    vision, llm = config.vision, config.llm
    tower, decoder = registry.tower_of(vision), registry.decoder_of(llm)
    return (
        f"{tower.label} tower of {vision.layers} blocks at {vision.image_size} pixels, projector {config.projector}, "
        f"{decoder.label} of {llm.layers} blocks, width {llm.width}"
    )
