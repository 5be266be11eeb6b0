"""`python -m llava_jax.data show | validate | index | prepare`: look at records before anything is trained on them."""

import argparse
import collections
import dataclasses
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable

import numpy as np
from etils import epath

from llava_jax import cli, errors, files
from llava_jax.data import index, prepare
from llava_jax.data.sources import JsonSource, open_source
from llava_jax.data.validate import REASONS, Finding, brief, rules, validate
from llava_jax.errors import DataError, UsageError
from llava_jax.prompt import templates, tokenizer
from llava_jax.prompt.encode import Format, encode, marked, with_labels

_NOTES_SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; the exit code: 0 done, 64 usage, 65 bad data."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llava_jax").setLevel(logging.INFO)
    return cli.run("data", lambda: options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m llava_jax.data", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verbs_help = {
        "show": (_show, "print each record's tokens, with what is learned marked"),
        "validate": (_validate, "list every bad record; exit 65 if there is one"),
        "index": (_index, "measure the records' lengths and print their histogram"),
        "prepare": (_prepare, "published raw files into LLaVA JSON, or any records into a TFDS data set"),
    }
    for verb, (run, text) in verbs_help.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.set_defaults(run=run)
        if verb == "prepare":
            _add_prepare(sub)
            continue
        sub.add_argument("records", metavar="RECORDS", help=".json list, .jsonl, or a TFDS directory")
        sub.add_argument("--split", default="train", help="of a TFDS directory")
        if verb != "show":
            sub.add_argument("--images", metavar="DIR", help="folder that image paths are relative to")
        sub.add_argument("--json", action="store_true", help="one JSON object a line")
        _add_format(sub, verb)
    return parser


def _add_format(sub: argparse.ArgumentParser, verb: str) -> None:
    sub.add_argument("--template", default="v1", help=f"one of {', '.join(templates.TEMPLATES)}; default v1")
    sub.add_argument("--tokenizer", metavar="PATH", required=verb == "show", help="tokenizer.model or a directory")
    sub.add_argument("--legacy", choices=("true", "false"), help="LLaMA tokenizer mode; default: what its files say")
    sub.add_argument("--image-start-end", action="store_true",
                     help="<im_start> and <im_end> around each image, tokens if the tokenizer has them")  # fmt: skip
    if verb == "show":
        return
    sub.add_argument("--row-tokens", type=int, default=2048, metavar="N", help="longest row; default 2048")
    sub.add_argument("--image-features", type=int, default=576, metavar="N", help="tokens of an image; default 576")
    if verb == "validate":
        sub.add_argument("--open-images", action="store_true", help="decode every image too")
    if verb == "index":
        sub.add_argument("--cache", metavar="DIR", help="keep the lengths there (WORKDIR/lengths: training reads them)")


def _format(options: argparse.Namespace, image_features: int) -> Format | None:
    template = templates.get(options.template)
    if not options.tokenizer:
        return None
    legacy = None if options.legacy is None else options.legacy == "true"
    loaded = tokenizer.load(options.tokenizer, legacy=legacy)
    return Format(template, loaded, 1, image_features, "pad", options.image_start_end)


def _show(options: argparse.Namespace) -> int:
    format, code = _format(options, image_features=1), 0
    for record in open_source(options.records, split=options.split):
        try:
            example = encode(record.conversation, format, open_images=False)
        except ValueError as error:
            print(f"data: {record.where}: {error}", file=sys.stderr)
            code = errors.DATA
            continue
        if options.json:
            ids, labels = with_labels(example)
            print(json.dumps({"id": record.id, "input_ids": ids.tolist(), "labels": labels.tolist()}))
        else:
            print(f"{record.where} id={brief(record.id)}: {len(example.tokens)} tokens (an image as one), "
                  f"{example.learned.sum()} learned\n{marked(example, format.tokenizer)}\n")  # fmt: skip
    return code


def _validate(options: argparse.Namespace) -> int:
    format, start = _format(options, options.image_features), time.monotonic()
    limits = rules(templates.get(options.template), format.tokenizer if format else None)
    try:
        source = open_source(options.records, options.images, split=options.split, keep_broken=True)
    except DataError as error:
        return _report(options, 0, [Finding(options.records, 0, None, "", "malformed_json", str(error))], start)
    broken = source.broken if isinstance(source, JsonSource) else ()
    findings = (Finding(source.path, i, line, "", "malformed_json", detail) for i, line, detail in broken)
    sound = validate(source, limits, format, options.row_tokens, options.open_images)
    return _report(options, len(source) + len(broken), itertools.chain(findings, sound), start)


def _report(options: argparse.Namespace, records: int, findings: Iterable[Finding], start: float) -> int:
    """Prints findings as they come, then counts; the exit code."""
    counts: collections.Counter[str] = collections.Counter()
    bad = set()
    for finding in findings:
        counts[finding.reason] += 1
        if finding.fatal:
            bad.add((finding.index, finding.line))
        if options.json:
            print(json.dumps(dataclasses.asdict(finding) | {"refused": finding.fatal}))
        elif finding.fatal or counts[finding.reason] <= _NOTES_SHOWN:
            print(finding)
    secs = time.monotonic() - start
    if options.json:
        print(json.dumps({"records": records, "bad": len(bad), "counts": counts, "secs": round(secs, 3)}))
        return errors.DATA if bad else 0
    for reason, count in counts.most_common():
        refused, meaning = REASONS[reason]
        print(f"{count:9,} {reason:22} {'refused' if refused else 'used   '} {meaning}")
    print(f"{options.records}: {records:,} records, {len(bad):,} bad, in {secs:.1f} s ({records / secs:,.0f}/s)"
          + _unchecked(options))  # fmt: skip
    return errors.DATA if bad else 0


def _unchecked(options: argparse.Namespace) -> str:
    skipped = []
    if not options.images and not files.is_dir(options.records):
        skipped.append("image files (--images DIR)")
    if not options.open_images:
        skipped.append("pictures (--open-images)")
    if not options.tokenizer:
        skipped.append("token counts (--tokenizer PATH)")
    return f"; not checked: {', '.join(skipped)}" if skipped else ""


def _index(options: argparse.Namespace) -> int:
    format = _format(options, options.image_features)
    templates.get(options.template)
    source = open_source(options.records, options.images, split=options.split)
    words = index.word_lengths(source, options.cache)
    lengths = np.abs(words) if format is None else index.token_lengths(source, format, options.cache)
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
