"""Programs that read our exports, asked the same prompts: transformers, vLLM and llama.cpp (through xllamacpp).

Each is imported when it is asked; none is needed by anything else here.
"""

import base64
import importlib.util
import json
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax.convert.files import read_json
from llava_jax.errors import UsageError
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.prompt.encode import IMAGE_LABEL
from llava_jax.prompt.images import open_image

ANSWER_SECS = 3600  # of llama.cpp: a 13B on a CPU needs minutes
CONTEXT = 4096  # positions at most that llama.cpp and vLLM are asked to hold


class Prompt(NamedTuple):
    """One question: as `encode` takes it, and as the turns and PNG files that become another's messages.

    The pictures belong to the first turn.
    """

    conversation: Conversation
    turns: tuple[Turn, ...]
    pictures: tuple[bytes, ...]
    new_tokens: int


class Answer(NamedTuple):
    """prompt: ids, with one -200 for a picture. ids: the greedy answer's.

    logits: float32 [ids, V] up to a constant a step, NaN where a step's are not known; None: of none.
    """

    prompt: list[int]
    ids: Sequence[int]
    text: str
    logits: np.ndarray | None


class Reader(NamedTuple):
    """modules: what must be installed. file: what it reads in an export. ask: (export, prompts) -> their answers."""

    modules: tuple[str, ...]
    file: str
    ask: Callable[[epath.Path, Sequence[Prompt]], Iterator[Answer]]

    def missing(self) -> str:
        """What is not installed, "" for nothing."""
        return " and ".join(name for name in self.modules if importlib.util.find_spec(name) is None)


def choose(served: epath.Path, names: Sequence[str] | None) -> dict[str, Reader]:
    """The readers of those names, or of the export's format.

    Raises:
      UsageError: there is no such reader, or it does not read this directory.
    """
    unknown = [name for name in names or () if name not in READERS]
    if unknown:
        raise UsageError(f"--with {unknown[0]}: wanted some of {', '.join(READERS)}")
    fit = {name: reader for name, reader in READERS.items() if any(served.glob(reader.file))}
    wrong = [name for name in names or () if name not in fit]
    if wrong or not fit:
        wish = {READERS[name].file for name in wrong} or {reader.file for reader in READERS.values()}
        raise UsageError(f"--served {served}: no {' or '.join(sorted(wish))} there; wanted an export of the format hf "
                         "for transformers and vllm, of gguf for llama.cpp")  # fmt: skip
    return {name: fit[name] for name in names or fit}


def data_url(picture: bytes) -> str:
    """A PNG file as a data: URL."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _messages(prompt: Prompt, part: Callable[[bytes], dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns as messages of typed parts, the pictures first."""
    shown = [part(picture) for picture in prompt.pictures]
    return [{"role": turn.role, "content": [*shown * (i == 0), {"type": "text", "text": turn.text}]}
            for i, turn in enumerate(prompt.turns)]  # fmt: skip


def _image_url(picture: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}


def _collapsed(ids: Sequence[int], image: int) -> list[int]:
    """Ids with one -200 for each run of the image's id."""
    starts = [number for i, number in enumerate(ids) if number != image or i == 0 or ids[i - 1] != image]
    return [IMAGE_LABEL if number == image else number for number in starts]


def _image_id(served: epath.Path) -> int:
    return read_json(served / "config.json")["image_token_index"]


def _ask_transformers(served: epath.Path, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    import torch
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(served, use_fast=False, local_files_only=True)
    if processor.chat_template is None:
        raise UsageError(f"--served {served}: no chat template in it (its README says why), so transformers cannot ask")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        served, dtype=torch.float32, local_files_only=True
    ).eval()
    image = _image_id(served)
    for prompt in prompts:
        messages = _messages(prompt, lambda picture: {"type": "image", "image": open_image(picture)})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=prompt.new_tokens, do_sample=False, output_logits=True,
                return_dict_in_generate=True, tokenizer=processor.tokenizer,
            )  # fmt: skip
        begin = inputs["input_ids"].shape[1]
        ids = out.sequences[0, begin:].tolist()
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        logits = torch.stack(out.logits)[:, 0].float().numpy()
        yield Answer(_collapsed(inputs["input_ids"][0].tolist(), image), ids, text, logits)


def _ask_vllm(served: epath.Path, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    import vllm

    most = max(len(prompt.pictures) for prompt in prompts)
    # It refuses more positions than the model has.
    positions = min(CONTEXT, read_json(served / "config.json")["text_config"]["max_position_embeddings"])
    model = vllm.LLM(str(served), dtype="float32", max_model_len=positions, limit_mm_per_prompt={"image": most})
    image = _image_id(served)
    for prompt in prompts:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=prompt.new_tokens)
        reply = model.chat(_messages(prompt, _image_url), sampling, use_tqdm=False)[0]
        output = reply.outputs[0]
        yield Answer(_collapsed(reply.prompt_token_ids, image), list(output.token_ids), output.text, None)


def _ask_llama_cpp(served: epath.Path, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    """llama.cpp's own server in this process, at a port of the loopback interface that it chooses."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    for name, field in (("model", params.model), ("mmproj", params.mmproj)):
        paths = sorted(map(str, served.glob(f"{name}-*.gguf")))
        if len(paths) != 1:
            raise UsageError(f"--served {served}: {len(paths)} files {name}-*.gguf there; wanted one")
        field.path = paths[0]
    params.n_ctx, params.n_parallel, params.verbosity = CONTEXT, 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before this process

    def post(path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(server.listening_address + path, content, {"Content-Type": "application/json"})
        with opener.open(request, timeout=ANSWER_SECS) as reply:
            return json.load(reply)

    marker = post("/props", None)["media_marker"]
    for prompt in prompts:
        text = post("/apply-template", {"messages": _messages(prompt, _image_url)})["prompt"]
        ids: list[int] = []
        for number, piece in enumerate(text.split(marker)):
            ids += [IMAGE_LABEL] * (number > 0)
            ids += post("/tokenize", {"content": piece, "add_special": number == 0, "parse_special": True})["tokens"]
        pictures = [base64.b64encode(picture).decode() for picture in prompt.pictures]
        reply = post("/completion", {
            "prompt": {"prompt_string": text, "multimodal_data": pictures}, "n_predict": prompt.new_tokens,
            "temperature": 0, "return_tokens": True, "cache_prompt": False, "n_probs": 10**6,
        })  # fmt: skip
        steps = reply.get("completion_probabilities", [])
        yield Answer(ids, reply["tokens"], reply["content"], _logits_of(steps, reply["tokens"]))


def _logits_of(steps: Sequence[dict[str, Any]], ids: Sequence[int]) -> np.ndarray | None:
    """float32 [ids, V] of what llama.cpp's server says of every token at every step; NaN where it says nothing, as of
    a token that ends within a character."""
    if not steps:
        return None
    logits = np.full((len(ids), len(steps[0]["top_logprobs"])), np.nan, np.float32)
    number = 0
    for row, id in zip(logits, ids):
        if number < len(steps) and steps[number]["id"] == id:
            logps = steps[number]["top_logprobs"]
            row[[one["id"] for one in logps]] = [one["logprob"] for one in logps]
            number += 1
    return logits


READERS = {
    "transformers": Reader(("transformers", "torch"), "config.json", _ask_transformers),
    "vllm": Reader(("vllm",), "config.json", _ask_vllm),
    "llama.cpp": Reader(("xllamacpp",), "*.gguf", _ask_llama_cpp),
}
