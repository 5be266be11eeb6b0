"""LLaVA in JAX: a model that sees a picture and talks about it, from data to scores, on TPU, GPU or a CPU.

What a notebook or a program needs is named here, and imported when it is first used:

    import llava_jax
    from llava_jax import Trainer, config

    model = llava_jax.load("runs/task")
    print(model.generate("What is unusual here?", ["photo.jpg"]).text)

    trainer = Trainer(config.load("configs/llava15_7b_task.py"), workdir="runs/task")
    trainer.fit()

| name | what it is |
|---|---|
| `load` | `llava_jax.generate.assistant.load`: a checkpoint, to be asked, as `llava_jax.generate.assistant.Assistant` |
| `Trainer` | `llava_jax.train.trainer.Trainer`: one training run |
| `Config` | `llava_jax.config.Config`: what a run is told; `llava_jax.config.load` reads it from a file |
| `Dataset` | `llava_jax.data.datasets.Dataset`: what a data set that is an object has |
| `Conversation`, `Turn`, `Video` | `llava_jax.prompt.conversation.Conversation`: what is said and shown |
| `Hook` | `llava_jax.train.loop.Hook`: what is called after every so many updates |
| `register` | `llava_jax.models.registry.register`: adds a tower, a connector or a decoder of your own |

The commands (`python -m llava_jax.train`, `chat`, `evaluate`, ...) parse their arguments and call the same.
"""

import importlib

__version__ = "0.1.0"  # setup.py reads it here
_MODULES = {
    "Config": "config", "Conversation": "prompt.conversation", "Dataset": "data.datasets", "Hook": "train.loop",
    "Trainer": "train.trainer", "Turn": "prompt.conversation", "Video": "prompt.conversation",
    "load": "generate.assistant", "register": "models.registry",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Imports what is public when it is asked for: `import llava_jax` takes no time and brings no jax."""
    if name not in _MODULES:
        raise AttributeError(f"module 'llava_jax' has no attribute {name!r}; it has {', '.join(_MODULES)}")
    return getattr(importlib.import_module(f"llava_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return ["__version__", *_MODULES]
