"""Loads an exported directory in whatever transformers runs this script, and prints what it sees as JSON.

    python load_export.py DIR PICTURE QUESTION OUT.npy

Not a test: `test_transformers.py` runs it in this environment and in one with transformers 4.57.
"""

import json
import sys

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

directory, picture, question, out = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(
    directory, output_loading_info=True, torch_dtype=torch.float32
)
processor = AutoProcessor.from_pretrained(directory, use_fast=False)
image = Image.open(picture)
messages = [
    {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A small one."}]},
    {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
    reply = model.generate(**inputs, max_new_tokens=8, do_sample=False)
np.savez(out, logits=logits.numpy(), pixels=inputs["pixel_values"].numpy())
print(json.dumps({
    "version": transformers.__version__,
    "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
    "mismatched": sorted(map(str, info["mismatched_keys"])),
    "ids": inputs["input_ids"][0].tolist(), "reply": reply[0, inputs["input_ids"].shape[1]:].tolist(),
    "text": processor.tokenizer.decode(reply[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True),
    "padding_side": processor.tokenizer.padding_side,
    "classes": [type(model).__name__, type(processor).__name__, type(processor.image_processor).__name__],
}))  # fmt: skip
