"""One experiment's settings: a Python file's `get_config()` and command-line overrides become frozen dataclasses.

ml_collections ends here: a package receives its own branch (`config.train`, `config.data`, ...) and can neither change
it nor find a key that nobody declared. A config file begins with `default()` or with `start_from` another file.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict, FieldReference, config_dict

from llava_jax import config_file, limits, typed
from llava_jax.errors import MissingFile, UsageError
from llava_jax.files import want_disk

Policy = Literal["none", "full", "save_qkv", "save_linear", "save_dots", "offload_inputs", "offload_qkv", "auto"]
Rate = float | None | tuple[float | None, ...]  # None: does not move; a tuple: one rate for each stacked layer


@dataclass(frozen=True)
class Model:
    preset: str = ""  # a name of models.presets; "": what the metadata of `base` says
    base: str = ""  # checkpoint directory of the starting weights; "": random
    start: str = ""  # checkpoint directory that for part of the model: stage 1's, or an imported projector
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # compute and frozen weights; trainable ones are float32
    frozen_dtype: Literal["compute", "int8"] = "compute"  # int8: the decoder's frozen matrices, a scale a column
    remat: Policy | tuple[Policy, ...] = "full"  # a tuple: one for each layer; auto: what the memory allows


@dataclass(frozen=True)
class Prompt:
    template: str = "v1"
    image_mode: Literal["square", "pad", "squash", "anyres"] = "pad"
    grids: str = ""  # of anyres: columns x rows of tiles, such as "1x2 2x1 2x2 3x1 1x3"; the first of equals is taken
    merge: Literal["flat", "spatial", "spatial_unpad"] = "spatial_unpad"  # of anyres: the tiles' features in order
    max_tiles: int = 0  # of anyres: features of more tiles are resized to so many ("anyres_max_9"); 0: never
    several: Literal["anyres", "pad"] = "anyres"  # of anyres: what several pictures of a conversation are, each
    frames: int = 0  # of a video at most, uniformly chosen (32 in OneVision); 0: no video is read
    fps: float = 0.0  # frames a second of a video, as far as that are no more than `frames`; 0: `frames` of any video
    time_stamps: bool = False  # the prompt says when a video's frames are, as LLaVA-Video's (with frames=64)
    image_start_end: bool = False
    legacy: bool | None = None  # the SentencePiece prefix rule; None: what the tokenizer's own files say
    tokenizer: str = ""  # directory or file; "": the one in `model.base`


@dataclass(frozen=True)
class Source:
    path: str = ""  # .json, .jsonl, .parquet, .tar, or a directory of parquet, tar, HF datasets or TFDS
    images: str = ""  # root of the pictures
    weight: float = 1.0  # share in the mixture relative to its own size
    name: str = ""  # for messages; "": the path


@dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...] = ()  # (): a dataset is given to the Trainer
    validation: tuple[Source, ...] = ()
    hold_out: float = 0.0  # share of the records that is not trained on, for train.eval_every; beside validation
    order: Literal["shuffle", "modality_length", "sequential"] = "shuffle"
    layout: Literal["padded", "packed"] = "padded"  # one sample a row, or as many as fit
    batch_samples: int = 128  # padded: samples, and rows, of a step; the reference's global batch
    rows_per_chip: int = 0  # packed: rows of a step for each part that mesh.data x mesh.fsdp cuts it into
    row_tokens: int = 2048
    sample_tokens: int = 0  # longest sample of a packed row, which may hold more than the model's positions; 0: the row
    lengths: tuple[int, ...] = ()  # padded: shorter row lengths (buckets) that a batch may take, in tokens
    rows_per_group: int = 1  # packed: neighbouring rows that share one pool of pictures
    images_per_group: int = 1  # pictures of a pool; padded: of a row
    share_images: bool = False  # packed: records of one picture lie together, the picture and what precedes it once
    skip_budget: float = 0.0  # share of records that may be bad, each replaced by a zero-weight placeholder
    threads: int = 8

    def __post_init__(self) -> None:
        limits.check_all("data", vars(self))
        self._check_layout()
        for name in ("sources", "validation"):
            for i, source in enumerate(vars(self)[name]):
                limits.check_all("source", vars(source), f"data.{name}.{i}")
                if not source.path:
                    raise UsageError(f"data.{name}.{i}.path is empty: want a file or directory of records")
        if self.sources and not any(source.weight for source in self.sources):
            raise UsageError("data.sources: every weight is 0, so no record would be read: want one above 0")
        if any(not 1 <= length <= self.row_tokens for length in self.lengths):
            raise UsageError(f"data.lengths={self.lengths}: want lengths of 1 to row_tokens={self.row_tokens} tokens")

    def named_sources(self) -> tuple[Source, ...]:
        """`sources`, for who reads them. Raises UsageError where there are none."""
        if not self.sources:
            raise UsageError("data.sources is empty: want at least one Source(path, images), or from Python a dataset, "
                             "Trainer(config, dataset)")  # fmt: skip
        return self.sources

    def _check_layout(self) -> None:
        if self.layout == "padded":
            if self.rows_per_chip or self.rows_per_group != 1 or self.sample_tokens or self.share_images:
                raise UsageError(
                    f"data.rows_per_chip={self.rows_per_chip}, data.rows_per_group={self.rows_per_group}, "
                    f"data.sample_tokens={self.sample_tokens}, data.share_images={self.share_images}: these are of "
                    "packed rows; set data.layout=packed, or say data.batch_samples alone"
                )
            return
        if self.rows_per_chip < 1 or self.rows_per_chip % self.rows_per_group:
            raise UsageError(
                f"data.rows_per_chip={self.rows_per_chip}: want a multiple of data.rows_per_group="
                f"{self.rows_per_group}, at least 1, where data.layout=packed"
            )
        if self.sample_tokens > self.row_tokens:
            raise UsageError(f"data.sample_tokens={self.sample_tokens}: want at most "
                             f"data.row_tokens={self.row_tokens}")  # fmt: skip
        if self.order == "modality_length" or self.lengths:
            raise UsageError(
                f"data.order={self.order}, data.lengths={self.lengths}: packed rows need neither samples of like "
                "length nor shorter rows; want order=shuffle or sequential and no lengths"
            )


@dataclass(frozen=True)
class Train:
    lr: float
    projector_lr: float | None = None  # None: lr
    vision_lr: float | None = None  # of the tower, where it is trained too; None: it is frozen
    steps: int | None = None  # exactly one of steps and epochs
    epochs: float | None = None
    seed: int = 42
    lengthen: bool = False  # a run of other steps or epochs goes on with its optimizer; its rates are the new length's
    warmup_ratio: float = 0.03  # ceil(warmup_ratio * steps) steps, the first at rate 0
    schedule: Literal["cosine", "cosine_whole", "constant"] = "cosine"  # whole: falls from step 0 on, as in LAVIS
    first_lr: float = 0.0  # where the warm-up to lr begins
    last_lr: float = 0.0  # where the cosine from lr ends
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None  # None: gradients are not clipped
    loss: Literal["token_mean", "group_mean"] = "token_mean"
    group_samples: int = 16  # a device's share in the reference: group_mean averages over such groups' token means
    label_smoothing: float = 0.0  # share of each target's probability that all of the vocabulary has in equal parts
    z_loss: float = 0.0  # times log(sum(exp(logits))) ** 2, which keeps logits from drifting; 1e-4 in PaLM
    accumulate: int = 1  # micro-batches in a step
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of AdamW's first moment; the second is float32
    offload_optimizer: bool = False  # the optimizer's state lives in the host's memory between updates
    lora_dropout: float = 0.0  # of the inputs of all adapters
    max_nonfinite: int = 3  # so many non-finite losses in a row end the run
    eval_every: int = 0  # steps; 0: never
    patience: int = 0  # validations in a row without a lower loss that end the run; 0: none do
    sample_every: int = 0  # steps; 0: never
    watchdog_secs: float = 1800.0  # without any progress after which the run ends with 42; a compilation is none

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UsageError(f"train.steps={self.steps}, train.epochs={self.epochs}: want exactly one of the two")
        limits.check_all("train", vars(self))
        for name in ("first_lr", "last_lr"):
            if vars(self)[name] > self.lr:
                raise UsageError(f"train.{name}={vars(self)[name]}: want 0 to train.lr={self.lr}")
        if self.first_lr and not self.warmup_ratio or self.last_lr and self.schedule == "constant":
            raise UsageError(
                f"train.first_lr={self.first_lr}, train.last_lr={self.last_lr}: the first is of a warm-up "
                f"(warmup_ratio={self.warmup_ratio}), the last of a cosine (schedule={self.schedule}); leave out what "
                "is not used"
            )


@dataclass(frozen=True)
class Lora:
    """An adapter: x @ kernel + alpha / rank * x @ a @ b."""

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        limits.check_all("lora", vars(self))


@dataclass(frozen=True)
class Mesh:
    data: int = 1
    fsdp: int = -1  # -1 (one axis at most): all devices that the other axes leave
    tensor: int = 1
    context: int = 1
    slices: int = 1  # TPU slices joined by the data centre's network; the other sizes are those of one slice

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        if sizes.pop("slices") < 1:
            raise UsageError(f"mesh.slices={self.slices}: want at least 1")
        if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
            raise UsageError(f"mesh={sizes}: want sizes of at least 1, or -1 for at most one of them")


@dataclass(frozen=True)
class Checkpoint:
    every: int = 500  # steps
    keep: int = 2
    best: bool = False  # the step with the lowest validation loss stays too, and is saved when it is found

    def __post_init__(self) -> None:
        limits.check_all("checkpoint", vars(self))


@dataclass(frozen=True)
class Log:
    every: int = 10  # steps
    tensorboard: bool = True
    wandb: str = ""  # project name; "": off

    def __post_init__(self) -> None:
        limits.check_all("log", vars(self))


@dataclass(frozen=True)
class Config:
    """Everything a run is told. `rates`, `init` and `lora` are the user's tables, read by `params.lookup`."""

    data: Data
    train: Train
    rates: tuple[tuple[str, Rate], ...]  # (pattern over parameter names, learning rate or None: frozen)
    init: tuple[tuple[str, str], ...]  # (pattern, checkpoint directory or "random")
    lora: tuple[tuple[str, Lora | None], ...] = ()  # (pattern over kernels, adapter or None); (): no adapters
    compiler_options: tuple[tuple[str, str | int | float | bool], ...] = ()  # beside the chip's own; XLA's names
    profile: int = 0  # updates to trace for xprof, after the first three; 0: none
    model: Model = Model()
    prompt: Prompt = Prompt()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    def __post_init__(self) -> None:
        limits.check("profile", self.profile)
        if self.data.hold_out and not self.train.eval_every:
            raise UsageError(f"data.hold_out={self.data.hold_out}: nothing evaluates these records; set "
                             "train.eval_every to a number of steps")  # fmt: skip
        if self.checkpoint.best and not self.train.eval_every:
            raise UsageError("checkpoint.best=True: no step has a validation loss; set train.eval_every to a number of "
                             "steps")  # fmt: skip
        if self.train.patience and not self.checkpoint.best:
            raise UsageError(f"train.patience={self.train.patience}: the run would end with steps that are worse than "
                             "its best; set checkpoint.best=True too")  # fmt: skip
        if not self.lora and self.train.lora_dropout:
            raise UsageError(f"train.lora_dropout={self.train.lora_dropout}: the table `lora` is empty; want 0")
        if self.data.layout == "packed":
            self._check_packed()
            return
        divisors = {"accumulate": self.train.accumulate}
        if self.train.loss == "group_mean":
            divisors["group_samples"] = self.train.group_samples
        for key, size in divisors.items():
            if self.data.batch_samples % size:
                samples = self.data.batch_samples
                raise UsageError(
                    f"train.{key}={size} does not divide data.batch_samples={samples}: want data.batch_samples to be a "
                    f"multiple of {size}, or train.{key} to divide {samples}, as {math.gcd(size, samples)} does"
                )

    def _check_packed(self) -> None:
        if self.train.loss != "token_mean":
            raise UsageError(f"train.loss={self.train.loss}: packed rows know no groups of samples; want token_mean")
        groups = self.data.rows_per_chip // self.data.rows_per_group
        if groups % self.train.accumulate:
            raise UsageError(
                f"train.accumulate={self.train.accumulate} does not divide the {groups} groups of a chip "
                "(data.rows_per_chip / data.rows_per_group)"
            )


BRANCHES = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
TOP = {"profile": int}  # scalars outside every branch
TABLES = ("rates", "init", "lora", "compiler_options")


def default() -> ConfigDict:
    """Every key at its default, for a config file to change; `train.projector_lr` is `train.lr` until it is set.

    A table takes its scalars by reference, so that a command-line override reaches it:
    `config.rates = (("projector/.*", config.train.get_ref("lr")), (".*", None))`.
    """
    config = ConfigDict(type_safe=False)
    for name, branch in BRANCHES.items():
        config[name] = {f.name: f.default for f in dataclasses.fields(branch) if f.default is not dataclasses.MISSING}
    config.train.lr = config_dict.placeholder(float)
    config.train.projector_lr = config.train.get_oneway_ref("lr")
    config.train.vision_lr = config_dict.placeholder(float)
    tables = {f.name: () if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(Config)}
    config.update({name: value for name, value in tables.items() if name not in BRANCHES})
    return config


def start_from(file: str, sibling: str) -> ConfigDict:
    """The config of another file of the same directory, to change: `start_from(__file__, "tiny_pretrain.py")`."""
    path = Path(file).parent / sibling
    try:
        return _run(path)
    except MissingFile:
        raise
    except UsageError as error:
        raise UsageError(f"config {path}: {error}") from error


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of a file, with overrides such as {"train.lr": 1e-4, "data.sources.0.path": "my.json"}.

    A value is read as the command line's text, of which it may be the value: 1e-4, "1e-4". In `init` the value "" reads
    "random", so `config.model.get_ref("base")` serves both.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown key, a wrong type or value, a missing key, a scalar that no table reads, or a path into a
        bucket; it names the file and the key.
    """
    want_disk(str(path), "--config", "a config is Python code")
    path, overrides = Path(path), {key: str(value) for key, value in (overrides or {}).items()}
    try:
        config = typed.build(Config, _plain(_overridden(_run(path), overrides)), "")
        _refuse_idle_scalars(path, overrides, config)
    except MissingFile:
        raise
    except ValueError as error:
        raise UsageError(f"config {path}: {error}") from None
    return dataclasses.replace(config, init=tuple((pattern, place or "random") for pattern, place in config.init))


def _run(path: Path) -> ConfigDict:
    if not path.is_file():
        hint = typed.near(path.name, [file.name for file in path.parent.glob("*.py")])
        raise MissingFile(f"config {path}: no such file{hint}; want a Python file with get_config()")
    config = config_file.run(path)
    if not isinstance(config, ConfigDict):
        raise UsageError(f"get_config() returns {type(config).__name__}: want the ConfigDict that default() made")
    return config


def _overridden(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    for key, text in overrides.items():
        branch, dot, rest = key.partition(".")
        if not dot and branch in TOP:
            config[branch] = typed.parse(text, TOP[branch], key)
        elif key.startswith(("data.sources.", "data.validation.")):
            name, place = rest.split(".", 1)
            config.data[name] = typed.replaced_in(config.data[name], place, text, Source(), f"data.{name}")
        elif branch == "lora":
            config.lora = _adapters(config, rest, text)
        else:
            config[branch][rest] = typed.parse(text, _hint(branch, rest, key), key)
    return config


def _hint(branch: str, name: str, key: str) -> Any:
    """The type of a branch's field, if both exist."""
    if branch in BRANCHES and name in typing.get_type_hints(BRANCHES[branch]):
        return typing.get_type_hints(BRANCHES[branch])[name]
    if branch in TABLES:
        raise UsageError(f"{key}: a table is set in the file; override the scalars it is made of, such as train.lr")
    known = [*TOP, *(f"{branch}.{f.name}" for branch, cls in BRANCHES.items() for f in dataclasses.fields(cls))]
    raise UsageError(f"unknown key {key!r}{typed.near_key(key, known)}")


def _adapters(config: ConfigDict, name: str, text: str) -> tuple[tuple[str, Lora | None], ...]:
    """The table `lora` with another rank or alpha in all its adapters."""
    if not any(adapter for _, adapter in config.lora):
        raise UsageError(f"lora.{name}={text}: the config has no adapters; begin with configs/llava15_7b_task_lora.py, "
                         "or another whose name has `lora`")  # fmt: skip
    return tuple((rows, one and typed.replaced(one, name, text, f"lora.{name}")) for rows, one in config.lora)


def _plain(value: Any) -> Any:
    """ConfigDicts as dicts, with every reference replaced by its value, inside tuples too."""
    if isinstance(value, FieldReference):
        return _plain(value.get())
    if isinstance(value, ConfigDict):
        return {key: _plain(value[key]) for key in value}
    if isinstance(value, tuple | list):
        return tuple(_plain(item) for item in value)
    return value


def _refuse_idle_scalars(path: Path, overrides: Mapping[str, str], config: Config) -> None:
    """A scalar that only tables can read must change a table when it changes: else it was set in vain."""
    in_use = {"train.projector_lr": config.train.projector_lr != config.train.lr, "train.lr": True,
              "train.vision_lr": config.train.vision_lr is not None,
              "model.base": config.model.base != "", "model.start": config.model.start != ""}  # fmt: skip
    for key in (key for key, used in in_use.items() if used):
        branch, name = key.split(".")
        probe = _overridden(_run(path), overrides)
        before = _plain((probe.rates, probe.init))
        probe[branch][name] = 1e9 if branch == "train" else "another/directory"
        if _plain((probe.rates, probe.init)) == before:
            raise UsageError(f"no row of rates or init reads {key}={vars(vars(config)[branch])[name]!r}")
