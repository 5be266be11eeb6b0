"""Records `generate.npz`: what transformers' greedy `generate` says to 20 pictures with random prompts.

Run with `python -m tests.golden.make_generate` where torch is installed (recorded with transformers 5.24.0, torch
2.13.0). The model is that of `models.npz`; `tests/generate/test_engine.py` needs no torch and also runs it live.
"""

from pathlib import Path

import numpy as np

from tests.golden.make_models import CONFIG, IMAGE_ID, hf_model

PATH = Path(__file__).with_name("generate.npz")
PROMPTS, NEW, END = 20, 24, 7
PENALTY = 1.3  # of the answers that are called "penalized 0", "penalized 1", ...


def prompts(seed: int = 3) -> list[dict[str, np.ndarray]]:
    """Prompts of 8 to 40 tokens with one picture each, in our fields; `tokens` hold 0 where features go."""
    rng = np.random.default_rng(seed)
    side, features = CONFIG.vision.image_size, CONFIG.vision.features
    made = []
    for _ in range(PROMPTS):
        length = int(rng.integers(8, 41))
        start = int(rng.integers(0, length - features))
        tokens = rng.integers(1, IMAGE_ID, length).astype(np.int32)
        image_slots = np.full(length, -1, np.int32)
        image_slots[start : start + features] = np.arange(features)
        tokens[image_slots >= 0] = 0
        pixels = rng.integers(0, 256, (1, side, side, 3)).astype(np.uint8)
        made.append({"tokens": tokens, "image_slots": image_slots, "pixels": pixels})
    return made


def expected(model, prompt: dict[str, np.ndarray], penalty: float = 1.0) -> np.ndarray:
    """The ids that transformers makes greedily, the end token included, int32 [up to NEW]."""
    import torch

    ids = np.where(prompt["image_slots"] >= 0, IMAGE_ID, prompt["tokens"])[None]
    mean, std = CONFIG.vision.mean, CONFIG.vision.std
    pixels = (prompt["pixels"].astype(np.float64) / 255 - mean) / std
    out = model.generate(
        input_ids=torch.tensor(ids, dtype=torch.long), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
        attention_mask=torch.ones(ids.shape, dtype=torch.long), max_new_tokens=NEW, do_sample=False,
        eos_token_id=END, pad_token_id=0, repetition_penalty=penalty,
    )  # fmt: skip
    return out[0, ids.shape[1] :].numpy().astype(np.int32)


def main() -> None:
    """Writes generate.npz next to this file."""
    model = hf_model()
    answers = {str(i): expected(model, prompt) for i, prompt in enumerate(prompts())}
    answers |= {f"penalized {i}": expected(model, prompt, PENALTY) for i, prompt in enumerate(prompts())}
    np.savez_compressed(PATH, **answers)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, answers of {sorted({len(ids) for ids in answers.values()})} ids")


if __name__ == "__main__":
    main()
