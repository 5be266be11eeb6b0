"""`python -m llava_jax.data show | look | validate | index | prepare`: look at records before training on them."""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
from etils import epath

from llava_jax import cli, errors, files, limits
from llava_jax import config as configs
from llava_jax.data import index, inspection, page, prepare, report, trees
from llava_jax.data.check import Checks, rules, rules_of
from llava_jax.data.inspection import Inspection
from llava_jax.data.page import Refused
from llava_jax.data.problems import brief
from llava_jax.data.sources import open_source
from llava_jax.errors import DataError, UsageError
from llava_jax.prompt import ending, templates, tokenizer
from llava_jax.prompt.conversation import IMAGE_MARKER, VIDEO_MARKER, Conversation, Video
from llava_jax.prompt.encode import Format, encode, marked, with_labels

_RECORDS = ".json list, .jsonl, .parquet, .tar, or a directory of parquet, tar, Hugging Face datasets or TFDS"
_FORMAT = {"template": "v1", "tokenizer": None, "legacy": None, "image_start_end": False, "row_tokens": 2048,
           "image_features": 576}  # fmt: skip
_CONFIG = "as a run of this config reads records, its own where no RECORDS are named; --config.BRANCH.KEY=VALUE too"
_LOOK = 8  # records on a page


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; the exit code: 0 done, 64 usage, 65 bad data."""
    return cli.run("data", lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    words, overrides = cli.overrides(arguments)
    options = _parser().parse_args(words)
    cli.show_progress()
    if overrides and not vars(options).get("config"):
        raise UsageError(f"--config.{next(iter(overrides))} changes a config: name it, with --config FILE")
    options.overrides = overrides
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m llava_jax.data", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verbs_help = {
        "show": (_show, "print each record's tokens, with what is learned marked"),
        "look": (_look, "draw some records on one HTML page: pictures, their tiles, tokens; of a config"),
        "validate": (_validate, "list every bad record; exit 65 if there is one, or more than a config's skip_budget"),
        "index": (_index, "measure the records' lengths and print their histogram"),
        "prepare": (_prepare, "published raw files into LLaVA JSON, or any records into a TFDS data set"),
    }
    for verb, (run, text) in verbs_help.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.set_defaults(run=run)
        if verb == "prepare":
            _add_prepare(sub)
            continue
        sub.add_argument("records", metavar="RECORDS", nargs=None if verb == "index" else "?", help=_RECORDS)
        sub.add_argument("--split", default="train", help="of a directory")
        sub.add_argument("--images", metavar="DIR", help="folder that image paths are relative to")
        if verb in ("show", "look"):
            of_page = f"; default {_LOOK}, or those of --id" if verb == "look" else ""
            sub.add_argument("--first", type=_count, metavar="N", help=f"only so many records{of_page}")
            sub.add_argument("--id", action="append", default=[], help="only the record of this id; may be repeated")
        if verb == "look":
            sub.add_argument("--config", metavar="FILE", required=True, help=_CONFIG)
            sub.add_argument("--out", metavar="PAGE.html", required=True, help="the page; it needs no other file")
            continue
        sub.add_argument("--json", action="store_true", help="one JSON object a line")
        _add_format(sub, verb)
        if verb == "show":
            sub.add_argument("--config", metavar="FILE", help=f"{_CONFIG}; pictures are opened too")
        if verb == "validate":
            _add_validate(sub)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: want 1 or more")
    return int(text)


def _add_format(sub: argparse.ArgumentParser, verb: str) -> None:
    sub.add_argument("--template", help=f"one of {', '.join(templates.TEMPLATES)}; default v1")
    sub.add_argument("--tokenizer", metavar="PATH",
                     help="tokenizer.model or a directory, such as CHECKPOINT/tokenizer")  # fmt: skip
    sub.add_argument("--legacy", choices=("true", "false"), help="LLaMA tokenizer mode; default: what its files say")
    sub.add_argument("--image-start-end", action="store_true", default=None,
                     help="<im_start> and <im_end> around each image, tokens if the tokenizer has them")  # fmt: skip
    if verb == "index":
        sub.add_argument("--cache", metavar="DIR", help="keep the lengths there (WORKDIR/lengths: training reads them)")
    if verb != "show":
        sub.add_argument("--row-tokens", type=int, metavar="N", help="longest row; default 2048")
        sub.add_argument("--image-features", type=int, metavar="N", help="tokens of an image; default 576")


def _add_validate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--open-images", action="store_true", help="decode every image too")
    sub.add_argument("--config", metavar="FILE",
                     help="check what a run of this config would: its format, limits and skip budget, and its sources "
                     "where no RECORDS are named; --config.BRANCH.KEY=VALUE as in train")  # fmt: skip
    sub.add_argument("--out", metavar="GOOD.json", help="write the records that are fit there, as they were written")


def _format(options: argparse.Namespace, image_features: int) -> Format | None:
    template = templates.get(options.template)
    if "row_tokens" in options:
        limits.check("data.row_tokens", options.row_tokens, "--row-tokens")
        limits.check_rows(options.row_tokens, options.image_features, None, shown="--row-tokens")
    if not options.tokenizer:
        return None
    legacy = None if options.legacy is None else options.legacy == "true"
    loaded = tokenizer.load(options.tokenizer, legacy=legacy)
    try:
        ending.check(template, loaded, options.tokenizer)
    except UsageError as error:
        if options.run is not _show:  # it shows what such letters would be, and decides nothing
            raise
        print(f"data: training would refuse this: {error}", file=sys.stderr)
    return Format(template, loaded, 1, image_features, "pad", options.image_start_end)


def _fill_in(options: argparse.Namespace) -> None:
    """Sets what no argument says to its default."""
    for name, value in _FORMAT.items():
        if vars(options).get(name, value) is None:
            setattr(options, name, value)


def _show(options: argparse.Namespace) -> int:
    if options.config:
        return _show_of_config(options)
    if not options.records or not options.tokenizer:
        raise UsageError(f"the following arguments are required: {'--tokenizer PATH' if options.records else 'RECORDS'}"
                         ", or --config FILE")  # fmt: skip
    if options.images:
        raise UsageError(f"--images {options.images}: pictures are opened with --config FILE only")
    _fill_in(options)
    format, code = _format(options, image_features=1), 0
    source = open_source(options.records, split=options.split)
    for _, record in inspection.select([source], options.first, options.id):
        try:
            conversation = record.conversation
            markers = _markers(conversation)
            counted = dataclasses.replace(conversation, images=(None,) * len(markers))  # none is looked at
            example = encode(counted, format, open_images=False)
        except ValueError as error:
            print(f"data: {record.where}: {error}", file=sys.stderr)
            code = errors.DATA
            continue
        if options.json:
            ids, labels = with_labels(example)
            print(json.dumps({"id": record.id, "input_ids": ids.tolist(), "labels": labels.tolist()}))
        else:
            print(f"{record.where} id={brief(record.id)}: {len(example.tokens)} tokens (an image as one), "
                  f"{example.learned.sum()} learned\n{marked(example, format.tokenizer, markers)}\n")  # fmt: skip
    return code


def _markers(conversation: Conversation) -> list[str]:
    return [VIDEO_MARKER if isinstance(one, Video) else IMAGE_MARKER for one in conversation.images]


def _show_of_config(options: argparse.Namespace) -> int:
    task, code = _of_config(options), 0
    for one in _examined(task, options):
        if isinstance(one, Refused):
            print(f"data: {one.where}: {one.reason}", file=sys.stderr)
            code = errors.DATA
            continue
        record, example = one.record, one.example
        if options.json:
            ids, labels = with_labels(example)
            print(json.dumps({"id": record.id, "input_ids": ids.tolist(), "labels": labels.tolist(),
                              "pictures": [picture.facts() for picture in one.pictures]}))  # fmt: skip
            continue
        print(f"{record.where} id={brief(record.id)}: {one}")
        for number, picture in enumerate(one.pictures, 1):
            print(f"  {picture.noun} {number}: {picture}")
        for problem in one.problems:
            print(f"  {problem.reason}: {problem.detail}")
        print(f"{marked(example, task.checks.format.tokenizer, _markers(one.conversation))}\n")
    return code


def _look(options: argparse.Namespace) -> int:
    if epath.Path(options.out).suffix != ".html":
        raise UsageError(f"--out {options.out}: want a name that ends in .html")
    options.first = options.first or (None if options.id else _LOOK)
    task = _of_config(options)
    records = list(_examined(task, options))
    title = ", ".join(place.path for place in task.places if place.trained)
    content = page.write(records, title, task.checks.format, task.checks.row_tokens)
    files.write_whole(options.out, content)
    refused = sum(isinstance(one, Refused) or one.fatal for one in records)
    print(f"drew {len(records)} records, {refused} of which training refuses: {options.out}, {len(content):,} bytes")
    return errors.DATA if refused else errors.DONE


def _examined(task: report.Task, options: argparse.Namespace) -> Iterator[Inspection | Refused]:
    """The records that the options name, of those that are trained on."""
    places = [place for place in task.places if place.trained]
    sources = [open_source(place.path, place.images, split=place.split) for place in places]
    for source, record in inspection.select(sources, options.first, options.id):
        try:
            yield inspection.examine(record, task.checks, source)
        except ValueError as error:
            yield Refused(record.where, str(error))


def _validate(options: argparse.Namespace) -> int:
    if options.config:
        unchecked = () if options.open_images else ("pictures (--open-images)",)
        task = _of_config(options)._replace(unchecked=unchecked)
        return report.run(task, options.open_images, options.json, options.out)
    if not options.records:
        raise UsageError("validate wants RECORDS, or --config FILE, whose sources it then reads")
    _fill_in(options)
    format = _format(options, options.image_features)
    checks = Checks(rules(templates.get(options.template), format and format.tokenizer), format, options.row_tokens)
    look = options.images is not None
    unchecked = {"image files (--images DIR)": look or files.is_dir(options.records),
                 "pictures (--open-images)": options.open_images,
                 "token counts (--tokenizer PATH)": format is not None,
                 "pictures of a row (--config FILE)": False}  # fmt: skip
    place = report.Place(options.records, options.images, options.split)
    skipped = tuple(what for what, done in unchecked.items() if not done)
    return report.run(report.Task([place], checks, look, 0.0, skipped), options.open_images, options.json, options.out)


def _of_config(options: argparse.Namespace) -> report.Task:
    """What a run of the config would check, and where."""
    given = [f"--{name.replace('_', '-')}" for name in _FORMAT if vars(options).get(name) is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: the config says it; change it with --config.prompt.template, "
                         "--config.data.row_tokens, ...")  # fmt: skip
    config = configs.load(options.config, options.overrides)
    from llava_jax.train import inputs  # here only: it brings jax

    format, data = inputs.format_of(config), config.data
    checks = Checks(rules_of(format), format, data.sample_tokens or data.row_tokens, data.images_per_group)
    places = [report.Place(one.path, one.images or None, options.split) for one in data.named_sources()]
    held_out = [report.Place(one.path, one.images or None, options.split, False) for one in data.validation]
    if options.records:
        images = options.images or next((p.images for p in (*places, *held_out) if p.path == options.records), None)
        places, held_out = [report.Place(options.records, images, options.split)], []
    return report.Task([*places, *held_out], checks, True, data.skip_budget, ())


def _index(options: argparse.Namespace) -> int:
    _fill_in(options)
    format = _format(options, options.image_features)
    source = open_source(options.records, options.images, split=options.split)
    words = index.word_lengths(source, options.cache)
    measures = None if format is None else index.measures(source, format, options.cache)
    lengths = np.abs(words) if measures is None else measures[:, 0]
    unit = "words" if format is None else "tokens"
    refused = int((lengths == 0).sum())
    lengths = np.sort(lengths[lengths > 0])
    if not len(lengths):
        raise DataError(f"{options.records}: none of its {refused} records is sound: see `validate`")
    quantiles = {f"p{part}": int(lengths[(len(lengths) - 1) * part // 100]) for part in (0, 5, 50, 95, 99, 100)}
    summary = {
        "records": len(source), "with_image": int((words > 0).sum()), "refused": refused, "unit": unit,
        "total": int(lengths.sum()), "longer_than_row": int((lengths > options.row_tokens).sum()), **quantiles,
    }  # fmt: skip
    if measures is not None:
        summary["saved_by_share_images"] = trees.saved(trees.prefixes(measures, source.images, options.row_tokens))
    edges = [0, *(2**power for power in range(4, 1 + max(4, int(lengths[-1] - 1).bit_length())))]
    counts = np.histogram(lengths, np.asarray(edges) + 1)[0].tolist()
    bins = [{"from": low + 1, "to": high, "records": count} for low, high, count in zip(edges, edges[1:], counts)]
    if options.json:
        print(json.dumps(summary | {"histogram": bins}))
        return 0
    print("  ".join(f"{key}={value}" for key, value in summary.items()))
    for row in bins:
        bar = "#" * (60 * row["records"] // max(counts))
        print(f"{row['from']:7,} to {row['to']:7,} {unit} {row['records']:9,} {bar}")
    return 0


def _add_prepare(sub: argparse.ArgumentParser) -> None:
    names = ", ".join(prepare.NAMES)
    sub.add_argument("records", metavar="NAME|RECORDS", help=f"{names}; or a .json list, .jsonl, or TFDS directory")
    sub.add_argument("--from", dest="raw", metavar="DIR", help="of NAME: the folder of its raw files")
    sub.add_argument("--out", metavar="DIR", required=True, help="where to write NAME.json, or llava_instruct/1.0.0")
    sub.add_argument("--to", choices=("json", "tfds"), help="default: json of NAME, tfds of RECORDS")
    sub.add_argument("--split", default="", help="of scienceqa, coco, or a TFDS directory; default: train")
    sub.add_argument("--images", metavar="DIR", help="of RECORDS: folder that image paths are relative to")
    sub.add_argument("--format", default="QCM-LEA", help="of scienceqa, such as QCM-LEPA or QCM-ALE")
    sub.add_argument("--file", default="", help="of llava-pretrain and llava-instruct: which raw file")
    sub.add_argument("--captions", default="random", choices=("first", "random", "all"), help="of a COCO picture")
    sub.add_argument("--seed", type=int, default=0, help="of random captions and questions")


def _prepare(options: argparse.Namespace) -> int:
    if options.to == "tfds" or options.records not in prepare.NAMES:
        files.want_disk(options.out, "--out", "array_record files are written there")
    if options.records not in prepare.NAMES:
        if options.raw is not None or options.to == "json":
            raise UsageError(f"prepare {options.records}: --from and --to json want one of {', '.join(prepare.NAMES)}")
        return _write_tfds(options.records, options.images, options.split or "train", options.out)
    if options.raw is None:
        raise UsageError(f"prepare {options.records} wants --from DIR, the folder of its raw files")
    asked = prepare.Options(options.split, options.format, options.file, options.captions, options.seed)
    made = prepare.make(options.records, options.raw, asked)
    for note in made.notes:
        print(note)
    if options.to == "tfds":
        with tempfile.TemporaryDirectory() as folder:
            return _write_tfds(prepare.write(made, folder), made.images, "train", options.out)
    path = prepare.write(made, options.out)
    print(f"wrote {len(made.records):,} records to {path}; their pictures: {made.images}\n"
          f"Check them: python -m llava_jax.data validate {path} --images {made.images}")  # fmt: skip
    return 0


def _write_tfds(records: epath.PathLike, images: epath.PathLike | None, split: str, out: str) -> int:
    from llava_jax.data.builders import llava_instruct  # here only: the other verbs need no tensorflow_datasets

    source = open_source(records, images, split=split)
    place = llava_instruct.write(source, out)
    print(f"wrote {len(source):,} records to {place}: give this directory as a source's path")
    return 0


if __name__ == "__main__":
    sys.exit(main())
