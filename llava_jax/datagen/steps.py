"""The steps of `curate` as the command runs them: files in, files out, one line of counts."""

import argparse
import functools
import os
import random
from pathlib import Path
from typing import Any

from llava_jax.datagen import curate, files, review, shots
from llava_jax.datagen.progress import Progress, unanswered
from llava_jax.errors import DataError, MissingFile, UsageError
from llava_jax.files import is_bucket, listed
from llava_jax.openai_client.cache import Cache
from llava_jax.openai_client.options import open_client

# Fields of answered rows, besides image_id and image.
_FIELDS = {
    curate.DESCRIBED: {"text": str, "tokens": int},
    curate.CORRECTED: {"text": str, "corrected": str, "finish": str},
    curate.FILTERED: {"text": str, "corrected": str, "dropped": str | None},
}


def _describe(options: argparse.Namespace) -> int:
    if (options.checkpoint is None) == (options.base_url is None or options.model is None):
        raise UsageError("want a describer: either --checkpoint DIR, or --base-url URL with --model NAME")
    paths = curate.pictures(options.images)
    if options.sample is not None:
        if options.sample < 1:
            raise UsageError(f"--sample {options.sample}: want at least 1")
        paths = sorted(random.Random(options.seed).sample(paths, min(options.sample, len(paths))))
    unreadable = curate.unreadable(paths, options.images)
    readable = sorted(set(paths) - {row["image"] for row in unreadable})
    prompts = curate.Prompts(*(_prompt(options, name) for name in ("describe.txt", "continue.txt")))
    if options.checkpoint is None:
        with open_client(options, options.out / "describe_cache.jsonl") as client:
            ask = curate.endpoint_describer(client, options.images, options.temperature, options.max_new_tokens)
            start = functools.partial(Progress, usage=lambda: client.usage)
            rows = curate.describe(readable, ask, prompts, options.short_tokens, start)
            print(client.usage)
    else:
        rows = _describe_by_checkpoint(options, readable, prompts)
    rows = sorted([*rows, *unreadable], key=lambda row: row["image"])
    files.write_lines(options.out / curate.DESCRIBED, rows)
    continued = sum(row.get("second") is not None for row in rows)
    counts = f"{len(rows):,} pictures, {continued:,} continued, {len(unreadable):,} unreadable"
    print(f"{options.out / curate.DESCRIBED}: {counts}")
    if not readable:
        raise DataError(f"{options.images}: none of {len(unreadable):,} pictures can be read: "
                        f"{unreadable[0]['unanswered']}")  # fmt: skip
    return unanswered([row["unanswered"] for row in rows if "unanswered" in row and row not in unreadable])


def _describe_by_checkpoint(
    options: argparse.Namespace, paths: list[str], prompts: curate.Prompts
) -> list[dict[str, Any]]:
    from llava_jax import compilations
    from llava_jax.datagen import describer  # here only: it brings the model, which the other steps need not
    from llava_jax.generate.assistant import Assistant

    compilations.keep()
    assistant = Assistant.open(options.checkpoint, slots=options.slots, template=options.template)
    checkpoint = options.checkpoint if is_bucket(options.checkpoint) else os.path.realpath(options.checkpoint)
    # Its steps are part of the name: a checkpoint that was trained further is asked again.
    name = f"{checkpoint} {[path.name for path in listed(checkpoint)]} {options.template}"
    cache = Cache(options.out / "describe_cache.jsonl")
    try:
        ask = describer.checkpoint_describer(assistant, name, cache, options.images, options.temperature or 0.0,
                                             options.max_new_tokens)  # fmt: skip
        return curate.describe(paths, ask, prompts, options.short_tokens, Progress)
    finally:
        cache.close()


def _correct(options: argparse.Namespace) -> int:
    rows = _rows(options, curate.DESCRIBED, "describe")
    with open_client(options, options.out / "correct_cache.jsonl") as client:
        start = functools.partial(Progress, usage=lambda: client.usage)
        limit = options.max_new_tokens, 0.0 if options.temperature is None else options.temperature
        corrected = curate.correct(client, rows, _prompt(options, "correct.txt"), *limit, start)
        usage = client.usage
    files.write_lines(options.out / curate.CORRECTED, corrected)
    changed = sum(row["corrected"] != row["text"] for row in corrected if "corrected" in row)
    print(f"{options.out / curate.CORRECTED}: {len(corrected):,} descriptions, {changed:,} changed\n{usage}")
    return unanswered([row["unanswered"] for row in corrected if "unanswered" in row])


def _filter(options: argparse.Namespace) -> int:
    rows = curate.apply_rules(_rows(options, curate.CORRECTED, "correct"))
    files.write_lines(options.out / curate.FILTERED, rows)
    dropped = files.count(row["dropped"] for row in rows if row["dropped"])
    print(f"{options.out / curate.FILTERED}: {len(rows) - sum(dropped.values()):,} of {len(rows):,} left, "
          f"dropped: {dropped or 'none'}")  # fmt: skip
    if sum(dropped.values()) == len(rows):
        raise DataError(f"{options.out / curate.FILTERED}: none of {len(rows):,} descriptions is left")
    return 0


def _review(options: argparse.Namespace) -> int:
    rows = _rows(options, curate.FILTERED, "filter")
    pages = review.write(options.out / curate.REVIEW, rows, lambda path: curate.thumbnail(options.images, path),
                         options.per_page)  # fmt: skip
    where = f": open {pages[0]} in a browser, save the decisions, give them to `export`" if pages else ""
    print(f"{len(pages)} pages{where}")
    return 0


def _export(options: argparse.Namespace) -> int:
    if bool(options.decisions) == options.no_review:
        raise UsageError("want the review's --decisions FILE ..., or --no-review to export without a review")
    rows = _rows(options, curate.FILTERED, "filter")
    decisions = None if options.no_review else curate.decisions(options.decisions)
    selection, counts = curate.select(rows, decisions)
    described = _rows(options, curate.DESCRIBED, "describe")
    instructions = shots.lines("curation/instructions.txt", options.prompts)
    curate.export(options.out, selection, options.images, instructions, options.seed)
    report = {"pictures": len(described), "exported": len(selection), "reviewed": not options.no_review, **counts,
              "continued": sum(row.get("second") is not None for row in described),
              "changed": sum(row["corrected"] != row["text"] for row in rows),
              "dropped_reasons": files.count(row["dropped"] for row in rows if row["dropped"]),
              "tokens": sorted(row["tokens"] for row in described if "tokens" in row)}  # fmt: skip
    files.write_json(options.out / "report.json", report)
    summary = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    print(f"{options.out / 'filter_cap.json'} and llava.json: {len(selection):,} of {len(described):,} pictures; "
          f"{summary}" + (" (UNREVIEWED)" if options.no_review else ""))  # fmt: skip
    if not selection:
        raise DataError(f"{options.out / 'llava.json'} holds no record: {summary}")
    return 0


def _rows(options: argparse.Namespace, name: str, step: str) -> list[dict[str, Any]]:
    path = options.out / name
    if not path.is_file():
        raise MissingFile(f"{path}: no such file: run `curate {step} --out {options.out}` first")
    rows = []
    for where, row in files.read_rows(path):
        image = Path(files.image_path(row, where))
        if files.field(row, where, "image_id", str, "the name of its image") != image.stem:
            raise DataError(f"{where}: image_id={row['image_id']!r}: want {image.stem!r}, of image={str(image)!r}")
        for key, kind in ({} if "unanswered" in row else _FIELDS[name]).items():
            files.field(row, where, key, kind, f"what `curate {step}` writes")
        rows.append(row)
    return rows


def _prompt(options: argparse.Namespace, name: str) -> str:
    return "\n".join(shots.lines(f"curation/{name}", options.prompts))


STEPS = {"describe": _describe, "correct": _correct, "filter": _filter, "review": _review, "export": _export}
