"""What a run reads, by its config: the model's sizes, the format of its records, its sources and their batches."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from llava_jax import config as configs
from llava_jax import params, sharding, typed
from llava_jax.checkpoint import model_json
from llava_jax.data.datasets import of_dataset
from llava_jax.data.feed import Feed
from llava_jax.data.packed import Packed
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.sources import Source, hold_out, open_source
from llava_jax.errors import DataError, UsageError
from llava_jax.models import presets
from llava_jax.models.presets import LlavaConfig
from llava_jax.prompt import anyres, ending, templates, tokenizer, video
from llava_jax.prompt.encode import Format
from llava_jax.train import program as programs

ALL_BUT_ONE = 0.999999  # a skip budget


def model_config(model: configs.Model) -> LlavaConfig:
    """The sizes that `model.base` says, which a named preset must agree with; without a base, the preset's.

    Raises:
      UsageError: both are empty, or they differ; names what differs.
      UnusableCheckpoint: the base is no checkpoint.
    """
    if not model.base:
        if not model.preset:
            raise UsageError("model.preset and model.base are both empty: name one of them")
        return presets.get(model.preset)
    held = presets.config_from_json(dict(model_json.read(model.base).model))
    if model.preset and presets.get(model.preset) != held:
        wanted, found = (params.flatten(presets.config_to_json(c)) for c in (presets.get(model.preset), held))
        raise UsageError(
            f"model.base={model.base} is no {model.preset}: {'; '.join(typed.difference(wanted, found))}. "
            'Set model.preset="" to take the sizes of the base, or name another base'
        )
    return held


def format_of(config: configs.Config, sizes: LlavaConfig | None = None) -> Format:
    """How a run of this config encodes its records.

    Args:
      sizes: of the model; None reads them.

    Raises:
      UsageError: as `model_config`; no tokenizer is named, or it fits neither the model nor the template.
    """
    sizes = model_config(config.model) if sizes is None else sizes
    programs.check(config, sizes)  # before rows are planned, which an absurd length makes endless
    if not config.prompt.tokenizer and not config.model.base:
        raise UsageError("prompt.tokenizer and model.base are both empty: name a tokenizer, or a checkpoint with one")
    place = config.prompt.tokenizer or epath.Path(config.model.base) / model_json.TOKENIZER
    words = tokenizer.load(place, config.prompt.legacy)
    rows = sizes.llm.vocab + sizes.llm.added_tokens
    if words.size > rows:
        raise UsageError(f"tokenizer {place} has {words.size} tokens, the model only {rows}: want one that fits it")
    template = templates.get(config.prompt.template)
    ending.check(template, words, str(place), config.prompt.image_start_end)
    prompt = config.prompt
    tiling = anyres.tiling(prompt.image_mode, prompt.grids, prompt.merge, prompt.max_tiles, prompt.several)
    anyres.check(tiling, sizes.image_newline, sizes.image_features)
    of_videos = video.rule(prompt.frames, prompt.fps, prompt.time_stamps)
    video.check(of_videos, sizes.image_features, sizes.cross is None)
    return Format(
        template, words, sizes.vision.image_size, sizes.image_features, config.prompt.image_mode,
        config.prompt.image_start_end, sizes.vision.mean, sizes.vision.resample,
        tiling, of_videos,
    )  # fmt: skip


def open_sources(config: configs.Config, dataset: Any) -> tuple[list[Source], list[Source]]:
    """(what is trained on, what only validates). What the hooks want is checked before anything large is read.

    dataset: a `Dataset`, or None: what `data.sources` names.

    Raises:
      UsageError: there are no records to train on, or none for `train.eval_every`.
      DataError: a source does not exist, or is damaged.
    """
    data = config.data
    if config.train.eval_every and not data.validation and not data.hold_out:
        raise UsageError(f"train.eval_every={config.train.eval_every} wants records, by --config.data.hold_out=0.02 "
                         "or --config.data.validation.0.path=FILE")  # fmt: skip
    held_out = _open(data.validation)
    sources = _open(data.named_sources()) if dataset is None else [of_dataset(dataset)]
    if not data.hold_out:
        return sources, held_out
    pairs = [hold_out(source, data.hold_out, config.train.seed) for source in sources]
    return [trained for trained, _ in pairs], [*held_out, *(rest for _, rest in pairs)]


def _open(sources: Sequence[configs.Source]) -> list[Source]:
    try:
        return [open_source(s.path, s.images or None, s.name, s.weight) for s in sources]
    except FileNotFoundError as error:
        raise DataError(str(error)) from None


def feed(config: configs.Config, format: Format, sources: Sequence[Source], workdir: epath.Path) -> Feed:
    """The batches that a run trains on."""
    return _feed(config, format, sources, workdir, one_pass=False)


def held_out_feed(config: configs.Config, format: Format, sources: Sequence[Source], workdir: epath.Path) -> Feed:
    """Each record once, for a mean loss. A bad record is left out of it: it must not end a run that trains well."""
    lenient = dataclasses.replace(config, data=dataclasses.replace(config.data, skip_budget=ALL_BUT_ONE))
    return _feed(lenient, format, sources, workdir, one_pass=True)


def _feed(
    config: configs.Config, format: Format, sources: Sequence[Source], workdir: epath.Path, one_pass: bool
) -> Feed:
    data, mesh = config.data, sharding.make_mesh(dataclasses.asdict(config.mesh))
    shared = {
        "sources": sources, "format": format, "row_tokens": data.row_tokens, "images_per_group": data.images_per_group,
        "order": data.order, "seed": config.train.seed, "part": programs.rows_here(data, mesh),
        "skip_budget": data.skip_budget, "threads": data.threads, "cache_dir": str(workdir / "lengths"),
        "one_pass": one_pass,
    }  # fmt: skip
    if data.layout == "packed":
        return Packed(rows=programs.rows_of(data, mesh), rows_per_group=data.rows_per_group,
                      sample_tokens=data.sample_tokens, share_images=data.share_images, **shared)  # fmt: skip
    return Pipeline(
        batch_samples=data.batch_samples, lengths=data.lengths,
        group_samples=math.gcd(data.batch_samples, config.train.group_samples),
        group_mean=config.train.loss == "group_mean" and not one_pass, **shared,
    )  # fmt: skip
