"""transformers + torch: a training step, greedy generation and the input pipeline, in float32 on the CPU.

Everything is what their documentation says to do for speed in plain eager mode: sdpa attention, the fused AdamW, the
static parts outside of the loop. Source: transformers 5.23, torch 2.13.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.utils import logging

from llava_jax.batch import Example
from llava_jax.data.sources import open_source
from llava_jax.prompt import templates
from tests.benchmarks import same
from tests.benchmarks.same import Sizes

logging.disable_progress_bar()
IGNORED = -100
Turn = Callable[[], tuple[float, list[float]]]


def train(folder: Path, sizes: Sizes, kind: str, rate: float) -> Turn:
    """Full fine-tuning of projector and decoder, the tower frozen; a turn is one step on each batch of `kind`.

    Of a mixture's step so many samples at a time are padded to the longest of them, after they were sorted by length.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder / same.THEIRS, dtype=torch.float32).train()
    model.model.vision_tower.requires_grad_(False)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    steps = [
        (sum(int(example.learned[1:].sum()) for example in examples),
         [_tensors(part, model.config) for part in _by_length(examples, sizes.samples)])
        for examples in same.batches(folder)[kind]
    ]  # fmt: skip

    def turn() -> tuple[float, list[float]]:
        begun, losses = time.perf_counter(), []
        for supervised, batches in steps:
            loss = 0.0
            for fields in batches:
                part = model(**fields, num_items_in_batch=supervised).loss
                part.backward()
                loss += part.item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
        return time.perf_counter() - begun, losses

    return turn


def _by_length(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def generate(folder: Path, sizes: Sizes, rows: int) -> Turn:
    """Greedy answers of exactly `new_tokens` to `rows` prompts; the check is the ids."""
    model = LlavaForConditionalGeneration.from_pretrained(folder / same.THEIRS, dtype=torch.float32).eval()
    fields = _tensors(same.prompts(folder, sizes, rows), model.config)
    fields.pop("labels")
    model.generation_config.eos_token_id = None  # every answer has its full length

    def turn() -> tuple[float, list[float]]:
        begun = time.perf_counter()
        with torch.inference_mode():
            ids = model.generate(**fields, do_sample=False, max_new_tokens=sizes.new_tokens)
        return time.perf_counter() - begun, ids[:, sizes.prompt_tokens :].flatten().tolist()

    return turn


def read(folder: Path, sizes: Sizes, batch: int, tiled: bool, workers: int) -> Turn:
    """Records to padded batches of ids and pixels; the check: places of images, and the first picture's mean.

    The ids are the same but for a space behind each image, which the original code has and LlavaProcessor has not.
    """
    torch.set_num_threads(1)  # as in DataLoader's workers
    records = _Records(folder, sizes, tiled)
    loader = DataLoader(records, batch_size=batch, num_workers=workers, collate_fn=_collated,
                        persistent_workers=workers > 0)  # fmt: skip

    def turn() -> tuple[float, list[float]]:
        begun, places, pixels = time.perf_counter(), 0.0, 0.0
        for fields in loader:
            places += (fields["input_ids"] == records.processor.image_token_id).sum().item()
            pixels = pixels or fields["pixel_values"][0].mean().item()
        return time.perf_counter() - begun, [places, pixels]

    return turn


class _Records(Dataset):
    """LLaVA records through LlavaProcessor or LlavaNextProcessor, whose image processors run on PIL: on the CPU the
    quicker of their two."""

    def __init__(self, folder: Path, sizes: Sizes, tiled: bool):
        side = sizes.image_size
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        if tiled:
            grids = [[rows * side, columns * side] for columns, rows in same.GRIDS]
            images = LlavaNextImageProcessorPil(image_grid_pinpoints=grids, **size)
        else:
            images = AutoImageProcessor.from_pretrained(folder / same.THEIRS, backend="pil", **size)
        self.processor = (LlavaNextProcessor if tiled else LlavaProcessor)(
            images, AutoTokenizer.from_pretrained(folder / same.THEIRS), patch_size=sizes.model.vision.patch_size,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip
        self.pictures = folder / same.PICTURES
        self.records = open_source(folder / same.RECORDS, self.pictures)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index].conversation
        image = Image.open(self.pictures / record.images[0]).convert("RGB")
        return self.processor(text=_text(record), images=image, return_tensors="pt")


def _text(record) -> str:
    """The conversation as its chat template writes it, with the image's place in it."""
    template = templates.get("v1")
    turns = [f"USER: {turn.text} " if turn.role == "user" else f"ASSISTANT: {turn.text}</s>" for turn in record.turns]
    return f"{template.system} {''.join(turns)}"


def _collated(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = [sample["input_ids"][0] for sample in samples]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
    }


def _tensors(examples: Sequence[Example], config) -> dict[str, torch.Tensor]:
    """A batch as their collator makes it: padded on the right to its own longest sample."""
    shape = len(examples), max(len(example.tokens) for example in examples)
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        ids[row, :n], mask[row, :n] = example.tokens, 1
        labels[row, :n] = np.where(example.learned, example.tokens, IGNORED)
        for span in example.image_spans:
            ids[row, span.start : span.start + span.length] = config.image_token_id
    vision = same.FULL.model.vision  # mean and standard deviation are CLIP's in every size
    pixels = np.stack([example.images[0] for example in examples]).astype(np.float32) / 255
    pixels = ((pixels - np.float32(vision.mean)) / np.float32(vision.std)).transpose(0, 3, 1, 2)
    fields = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": np.ascontiguousarray(pixels)}
    return {name: torch.from_numpy(array) for name, array in fields.items()}
