"""The settings and the model that a workdir's checkpoints were trained with, and which settings a resume may change."""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from llava_jax import config as configs
from llava_jax import distributed, files, params, typed
from llava_jax.checkpoint import model_json, reader, record
from llava_jax.errors import UsageError
from llava_jax.models import presets
from llava_jax.models.presets import LlavaConfig

FILE = "config.json"
# Keys that may change between two starts of one run: they change no number that is trained. On another mesh sums are
# taken in another order: the state goes over bit for bit, later losses agree to about 2e-6. A step's rows stay as they
# were, so on half the chips each takes twice the rows_per_chip; the data's own state says so where it does not.
HARMLESS = re.compile(
    r"log\..*|checkpoint\..*|mesh\..*|compiler_options.*|profile|model\.(remat|base|start)|init.*"
    r"|data\.(rows_per_chip|threads|skip_budget|validation.*|sources\.\d+\.(path|images|name))"
    r"|train\.(eval_every|patience|sample_every|max_nonfinite|offload_optimizer|watchdog_secs|lengthen)"
)
LENGTH = ("train.steps", "train.epochs")  # may change where train.lengthen says that this is meant
LOCAL = re.compile(r"data\.(sources|validation)\.\d+\.(path|images|name)")  # may differ between hosts


def common(config: configs.Config) -> dict[str, Any]:
    """The settings that all processes must have in common; of data the content is compared, not the path."""
    return {key: value for key, value in typed.describe(config).items() if not LOCAL.fullmatch(key)}


def check(workdir: epath.Path, config: configs.Config) -> None:
    """Compares the settings with those of the workdir's checkpoints, on process 0 for all.

    Raises:
      UsageError: on all processes; a setting differs that decides what is trained, or no training run wrote the
        checkpoints.
    """
    fault = _fault(workdir, config) if distributed.index() == 0 else ""
    if fault := distributed.exchange("settings", fault)[0]:
        raise UsageError(fault)


def check_model(workdir: epath.Path, sizes: LlavaConfig, tokenizer_files: Mapping[str, bytes]) -> None:
    """Compares the model and its tokenizer with those of the workdir's checkpoints, on process 0 for all.

    `model.base` may have moved, but it must be what it was.

    Raises:
      UsageError: on all processes; one of them is another.
    """
    fault = _model_fault(workdir, sizes, tokenizer_files) if distributed.index() == 0 else ""
    if fault := distributed.exchange("model", fault)[0]:
        raise UsageError(fault)


def write(workdir: epath.Path, config: configs.Config) -> None:
    """Writes the settings down; process 0 calls it."""
    files.write_whole(workdir / FILE, json.dumps(typed.describe(config), indent=1).encode())


def _fault(workdir: epath.Path, config: configs.Config) -> str:
    steps = reader.numbered(workdir)
    if not steps:
        return ""
    path = workdir / FILE
    if not files.exists(path) and not any(files.exists(workdir / str(step) / record.ITEM) for step in steps):
        return f"--workdir {workdir} holds a checkpoint that no training run wrote: name another directory"
    before = _read(path)
    if before is None:
        write(workdir, config)
        return ""
    now = typed.describe(config)
    before = {key: value for key, value in _defaults().items() if key not in before} | before
    left_out = set(LENGTH) if config.train.lengthen else set[str]()
    changed = typed.difference(*(
        {key: value for key, value in settings.items() if key not in left_out and not HARMLESS.fullmatch(key)}
        for settings in (before, now)
    ))  # fmt: skip
    if not changed:
        if left_out:
            write(workdir, config)
        return ""
    length = " To train on for longer, with the optimizer as it is: --config.train.lengthen=true."
    return (
        f"--workdir {workdir} holds a run with other settings: {'; '.join(changed)}. Go on with the old ones, or begin "
        f"anew from its weights: --workdir NEW --config.{_start_key(config)}={workdir}."
        f"{length if any(one.startswith(LENGTH) for one in changed) else ''}"
    )


def _model_fault(workdir: epath.Path, sizes: LlavaConfig, tokenizer_files: Mapping[str, bytes]) -> str:
    if not reader.numbered(workdir):
        return ""
    before = params.flatten(presets.config_to_json(presets.config_from_json(dict(model_json.read(workdir).model))))
    changed = typed.difference(before, params.flatten(presets.config_to_json(sizes)))
    if model_json.read_tokenizer_files(workdir) != dict(tokenizer_files):
        changed.append(f"the files of {workdir / model_json.TOKENIZER}")
    return "" if not changed else (
        f"--workdir {workdir} holds a run of another model ({'; '.join(changed)}): model.base, model.preset and "
        "prompt.tokenizer may lie elsewhere than before, but must be what they were"
    )


def _start_key(config: configs.Config) -> str:
    """The key that the table `init` takes a checkpoint from."""
    places = [place for _, place in config.init]
    return "model.start" if config.model.start and config.model.start in places else "model.base"


def _read(path: epath.Path) -> dict[str, Any] | None:
    """The settings of a file; None where it is gone, or damaged and set aside: it must not stop a good run."""
    taken = "the settings of this command are taken for those of the run"
    try:
        settings = json.loads(files.read(path))
        if isinstance(settings, dict):
            return settings
        fault = f"JSON of type {type(settings).__name__}"
    except FileNotFoundError:
        print(f"{path} is gone: {taken}", file=sys.stderr, flush=True)
        return None
    except IsADirectoryError:
        fault = "it is a directory"
    except (ValueError, RecursionError) as error:
        fault = str(error)
    place = files.set_aside(path)
    print(f"{path} is damaged ({fault}): it is now called {place.name}, and {taken}", file=sys.stderr, flush=True)
    return None


def _defaults() -> Mapping[str, Any]:
    """The value of every setting that an older version did not know, so did not write."""
    return {
        f"{branch}.{field.name}": field.default
        for branch, kind in configs.BRANCHES.items() for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING and not isinstance(field.default, tuple)
    }  # fmt: skip
