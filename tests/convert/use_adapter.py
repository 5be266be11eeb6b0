"""Loads adapters in whatever peft and transformers run this script, or makes them, and saves the models' logits.

    python use_adapter.py INPUTS.npz JOBS

JOBS is a JSON list of {"model": DIR, "adapter": DIR, "config": null}; with a config (keys of LoraConfig) the adapter
is drawn and saved, else loaded. Logits with it and without it go to ADAPTER.npz; what is seen is printed as JSON.
Not a test: `test_peft_live.py` runs it in this environment and in one with transformers 4.57.
"""

import json
import sys
import warnings

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlavaForConditionalGeneration

inputs, jobs = sys.argv[1:]
given = np.load(inputs)
arguments = {"input_ids": torch.tensor(given["ids"].astype(np.int64)), "pixel_values": torch.tensor(given["pixels"])}
seen = []
for job in json.loads(jobs):
    model = LlavaForConditionalGeneration.from_pretrained(job["model"], torch_dtype=torch.float32).eval()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = model(**arguments).logits
        if job["config"]:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(**job["config"])).eval()
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(job["adapter"])
        else:
            model = PeftModel.from_pretrained(model, job["adapter"]).eval()
        logits = model(**arguments).logits
    np.savez(job["adapter"] + ".npz", logits=logits.numpy(), plain=plain.numpy())
    wrapped = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    said = [str(warning.message) for warning in caught if "adapter" in str(warning.message)]
    seen.append({"version": transformers.__version__, "wrapped": len(wrapped), "warnings": said})
print(json.dumps(seen))
