"""Stage 1 of a tiny random model on your own LLaVA JSON: tries data, mesh and resume on a laptop before real weights.

    python -m llava_jax.train --config configs/tiny_pretrain.py --workdir runs/tiny_pretrain \
        --config.data.sources.0.path=my.json --config.data.sources.0.images=my_pictures

Numbers: models/presets.py `tiny` with the tokenizer of the tests; the rest is chosen to end within a minute on a CPU.
Expected: 20 steps, the first with learning rate 0. The loss starts near ln(960) = 6.9 and hardly falls: the language
  model is random and frozen. This only tests the pipeline; `python -m llava_jax.demo` trains something that answers.
"""

from ml_collections import ConfigDict

from llava_jax.config import Source, default


def get_config() -> ConfigDict:
    config = default()
    config.model.update(preset="tiny", dtype="float32", remat="none")
    config.prompt.update(
        template="plain", image_mode="square", tokenizer="tests/golden/tiny_llama.model", legacy=False
    )  # fmt: skip
    config.data.update(sources=(Source("my.json", "my_pictures"),), batch_samples=8, row_tokens=128, threads=2)
    config.train.update(steps=20, lr=1e-2)
    config.log.update(every=5, tensorboard=False)
    config.rates = (("projector/.*", config.train.get_ref("lr")), (".*", None))
    config.init = ((".*", config.model.get_ref("base")),)  # no base: random
    return config
