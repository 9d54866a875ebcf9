"""The bad job files and overrides, each with the exact text that a user sees.

A test that asks for `bad_job` runs once for each row. PATH stands for the path of the file as it was given.
"""

# One row a line reads better than five lines a row.
# ruff: noqa: E501

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

GOOD = """\
kind: train
name: sample
data:
  train: data/shards
  image_size: 32
model: {arch: vgg, widths: [8, 16, 32, 64], pool_after: [1]}
objective: {name: hff}
train:
  epochs: 4
  global_batch_size: 100
  lr: 1e-3
cluster: {workers: 2, stages: 2}
"""


@dataclass(frozen=True)
class Row:
    """A change of the good job, or a whole other file, and overrides; and what is said about it."""

    name: str
    message: str
    old: str = ""
    new: str = ""
    content: str | bytes | None = None
    overrides: tuple[str, ...] = field(default=())


def _edit(name: str, old: str, new: str, message: str) -> Row:
    assert GOOD.count(old) == 1, f"{name}: {old!r} must be in the good job once"
    return Row(name, message, old=old, new=new)


def _file(name: str, content: str | bytes, message: str) -> Row:
    return Row(name, message, content=content)


def _set(name: str, override: str, message: str) -> Row:
    return Row(name, message, overrides=(override,))


_FIRST = "PATH:1: "
_NAME = "must be 1 to 100 letters, digits, dots, dashes and underscores, the first a letter or a digit"
_SCHEMES = "must be digits, a path, or a URL that begins with file, http, https, s3, gs"

FILES = (
    _file("empty", "", _FIRST + "must be a mapping of keys (kind, name, data, ...), got an empty file"),
    _file(
        "comments only",
        "# a\n",
        _FIRST + "must be a mapping of keys (kind, name, data, ...), got an empty file",
    ),
    _file("list on top", "# x\n- a\n", "PATH:2: must be a mapping of keys (kind, name, data, ...), got a list"),
    _file(
        "text on top",
        "train\n",
        _FIRST + "must be a mapping of keys (kind, name, data, ...), got a single value",
    ),
    _file("binary", b"\x7fELF\x00\x01", "PATH: must be a text file, got a binary file"),
    _file("not UTF-8", b"kind: train\nname: caf\xe9\n", "PATH:2: must be UTF-8 text, got the byte 0xe9"),
    _file("UTF-16", "kind: x".encode("utf-16"), "PATH: must be a text file, got a binary file"),
    _file("over 1 MiB", b"#" * (2**20 + 1), "PATH: must be at most 1 MiB, got more"),
    _file("over 32 levels", "a: " + "[" * 40 + "]" * 40, _FIRST + "must be at most 32 levels deep, got more"),
    _file("a bomb of brackets", "[" * 2**20, _FIRST + "must be at most 32 levels deep, got more"),
    _file("over 32 levels of blocks", "- " * 40 + "a", _FIRST + "must be at most 32 levels deep, got more"),
    _file("tab", GOOD.replace("  lr", "\tlr"), "PATH:11: must be spaced and indented with spaces, got a tab"),
    _file("control character", "name: \x07\n", _FIRST + "must be without control characters, got '\\x07'"),
    _file("two documents", GOOD + "---\na: 1\n", "PATH:13: must be one document, got a second one"),
    _file("open quote", "kind: train\nname: 'x\n", "PATH:2: must close the quote, got no end up to line 2"),
    _file("wrong indentation", "a:\n    b: 1\n  c: 2\n", "PATH:3: must be YAML, got 'c: 2'"),
    _file("two colons", "kind: train\nname: a: b\n", "PATH:2: must be YAML, got 'name: a: b'"),
    _edit(
        "open bracket",
        "[8, 16, 32, 64]",
        "[8, 16, 32, 64",
        "PATH:6: must close the bracket '[', got no end up to line 6",
    ),
    _edit(
        "open brace",
        "{workers: 2, stages: 2}",
        "{workers: 2,",
        "PATH:12: must close the bracket '{', got no end up to line 12",
    ),
)

YAML_FEATURES = (
    _edit("duplicate key", "  lr: 1e-3", "  lr: 1e-3\n  lr: 1", "PATH:12: train.lr: must be given once, got a duplicate of line 11"),
    _edit("alias", "epochs: 4", "epochs: *four", "PATH:9: train.epochs: must be written out (no aliases), got the alias *four"),
    _edit("anchor", "epochs: 4", "epochs: &n 4", "PATH:9: train.epochs: must be written out (no anchors), got the anchor &n"),
    _edit("tag", "name: sample", "name: !!str 1", "PATH:2: name: must be a plain value (no tags), got the tag !!str"),
    _edit("alias as a key", "name: sample", "*a : b", "PATH:2: must have words as keys, got the alias *a"),
    _edit(
        "tag that runs code elsewhere",
        "name: sample",
        "name: !!python/object/apply:os.system [ls]",
        "PATH:2: name: must be a plain value (no tags), got the tag !!python/object/apply:os.system",
    ),
    _edit(
        "merge key",
        "train:\n  epochs: 4",
        "train:\n  <<: {epochs: 4}\n  epochs: 4",
        "PATH:9: train.<<: must be a known key, got '<<' (known: epochs, steps, samples, global_batch_size, "
        "micro_batches, optimizer, lr, weight_decay, momentum, betas, lr_schedule, warmup_epochs, warmup_steps, schedule, "
        "precision, link_precision, seed, max_hours, init_from, eval_every_epochs, grad_clip, ema_decay, compile, vote_from_train)",
    ),
    _edit("list as a key", "name: sample", "[a]: b", "PATH:2: must have words as keys, got a list or a mapping as a key"),
)  # fmt: skip

KEYS = (
    _edit("unknown key on top", "cluster:", "clusters:", "PATH:12: clusters: must be a known key, got 'clusters'; did you mean 'cluster'?"),
    _edit("mistyped duration, with no word of a missing one", "epochs: 4", "epoch: 4", "PATH:9: train.epoch: must be a known key, got 'epoch'; did you mean 'epochs'?"),
    _edit("mistyped duration beside another", "epochs: 4", "step: 9\n  epochs: 4", "PATH:9: train.step: must be a known key, got 'step'; did you mean 'steps'?"),
    _edit("mistyped key beside the right one", "  lr: 1e-3", "  lrr: 1e-3\n  lr: -1", "PATH:11: train.lrr: must be a known key, got 'lrr'; did you mean 'lr'?\nPATH:12: train.lr: must be > 0, got -1"),
    _edit("mistyped key, with no word of the missing one", "  lr: 1e-3", "  learning_rate: 1e-3", "PATH:11: train.learning_rate: must be a known key, got 'learning_rate'; did you mean 'lr'?"),
    _edit("key of another section", "  image_size: 32", "  image_size: 32\n  seed: 1", "PATH:6: data.seed: must be a known key, got 'seed'; did you mean 'train.seed'?"),
    _edit("empty key", "cluster:", "'':", "PATH:12: '': must be a known key, got '' (known: kind, name, runs, data, model, objective, train, per_layer, cluster, checkpoint, tracking)"),
    _edit("key of two lines", "cluster:", '"a\\nb":', "PATH:12: 'a\\nb': must be a known key, got 'a\\nb' (known: kind, name, runs, data, model, objective, train, per_layer, cluster, checkpoint, tracking)"),
    _edit("unknown augmentation", "  image_size: 32", "  image_size: 32\n  augment: {blur: 0.2}", "PATH:6: data.augment.blur: must be a known key, got 'blur' (known: crop_padding, flip, resized_crop, cutout, color_jitter, rand_augment, mixup, cutmix)"),
    _edit("unknown jitter", "  image_size: 32", "  image_size: 32\n  augment: {color_jitter: {brightnes: 0.2}}", "PATH:6: data.augment.color_jitter.brightnes: must be a known key, got 'brightnes'; did you mean 'brightness'?"),
    _edit("missing key", "  lr: 1e-3\n", "", "PATH:8: train.lr: must be given (a number > 0), got nothing"),
    _edit("missing section", "objective: {name: hff}\n", "", "PATH:1: objective: must be given (a mapping of keys), got nothing"),
    _edit("missing name of the objective", "{name: hff}", "{margin: 0.1}", "PATH:7: objective.name: must be given (one of hff, ff, ce, bp, own), got nothing"),
    _edit("empty section", "{workers: 2, stages: 2}", "", "PATH:12: cluster: must be a mapping of keys, got nothing"),
    _edit("unknown architecture", "arch: vgg", "arch: vgg16", "PATH:6: model.arch: must be one of mlp, vgg, resnet, own, got 'vgg16'; did you mean 'vgg'?"),
    _edit("another tool's word for a key", "  lr: 1e-3", "  lr: 1e-3\n  learning_rate: 1", "PATH:12: train.learning_rate: must be a known key, got 'learning_rate'; did you mean 'lr'?"),
    _edit("unknown optimizer", "  lr: 1e-3", "  lr: 1e-3\n  optimizer: lion", "PATH:12: train.optimizer: must be one of adamw, sgd, got 'lion'"),
    _edit("unknown objective", "{name: hff}", "{name: hfff}", "PATH:7: objective.name: must be one of hff, ff, ce, bp, own, got 'hfff'; did you mean 'hff'?"),
    _edit("own objective without a file", "{name: hff}", "{name: own, class: Mine}", "PATH:7: objective.file: must be given (text), got nothing"),
    _edit("own objective without a class", "{name: hff}", "{file: mine.py}", "PATH:7: objective.class: must be given (the name of a class in objective.file), got nothing"),
    _edit("own objective with an option that is no number", "{name: hff}", "{file: mine.py, class: Mine, deep: [1, {a: .inf}]}", "PATH:7: objective.deep.1.a: must be a finite number, got .inf"),
    Row("key of three objectives", "PATH:7: objective.label_smoothing: must be left out (hff, ce, bp alone have it), got 'label_smoothing'", old="{name: hff}", new="{name: ff, label_smoothing: 0.1}", overrides=("cluster.stages=1", "model.norm=none")),
    _edit("own objective with a number as its class", "{name: hff}", "{file: mine.py, class: 7}", "PATH:7: objective.class: must be the name of a class, got 7"),
    Row("similarity of an objective without", "PATH:7: objective.similarity: must be left out (hff, ce alone have it), got 'similarity'", old="{name: hff}", new="{name: bp, similarity: 1}", overrides=("cluster.stages=1",)),
    _edit("key of another objective", "{name: hff}", "{name: ce, margin: 0.1}", "PATH:7: objective.margin: must be left out (objective hff alone has it), got 'margin'"),
    _edit("key of another architecture", "arch: vgg, widths: [8, 16, 32, 64]", "arch: mlp, widths: [8, 16]", "PATH:6: model.pool_after: must be a known key, got 'pool_after' (known: vote, arch, widths, norm, dropout)"),
    _edit("unknown kind", "kind: train", "kind: tune", "PATH:1: kind: must be one of train, search, transfer, got 'tune'"),
    _edit("kind with a slip", "kind: train", "kind: trian", "PATH:1: kind: must be one of train, search, transfer, got 'trian'; did you mean 'train'?"),
)  # fmt: skip

VALUES = (
    _edit("number as text", "1e-3", "1e-3x", "PATH:11: train.lr: must be a number > 0, got '1e-3x'"),
    _edit("number in quotes", "1e-3", "'0.1'", "PATH:11: train.lr: must be a number > 0, got '0.1'"),
    _edit("negative number", "1e-3", "-1", "PATH:11: train.lr: must be > 0, got -1"),
    _edit("zero", "1e-3", "0", "PATH:11: train.lr: must be > 0, got 0"),
    _edit("bool as a number", "1e-3", "true", "PATH:11: train.lr: must be a number > 0, got true"),
    _edit("nothing", "1e-3", "", "PATH:11: train.lr: must be a number > 0, got nothing"),
    _edit("nan", "1e-3", ".nan", "PATH:11: train.lr: must be a finite number, got .nan"),
    _edit("inf", "1e-3", "-.inf", "PATH:11: train.lr: must be a finite number, got -.inf"),
    _edit("nan as a word", "1e-3", "nan", "PATH:11: train.lr: must be a number > 0, got 'nan'"),
    _edit("beyond float", "1e-3", "1e999", "PATH:11: train.lr: must be a finite number, got 1e999"),
    _edit("bool as int", "epochs: 4", "epochs: true", "PATH:9: train.epochs: must be a whole number >= 1, got true"),
    _edit("fraction as int", "epochs: 4", "epochs: 4.0", "PATH:9: train.epochs: must be a whole number >= 1, got 4.0"),
    _edit("underscores", "epochs: 4", "epochs: 1_000", "PATH:9: train.epochs: must be a whole number >= 1, got '1_000'"),
    _edit("too many digits", "epochs: 4", "epochs: 9" + "9" * 400, "PATH:9: train.epochs: must be a finite number, got " + "9" * 60),
    _edit("beyond int", "epochs: 4", "epochs: 4000000000", "PATH:9: train.epochs: must be <= 2147483647, got 4000000000"),
    _edit("no is a text", "  lr: 1e-3", "  lr: 1e-3\n  momentum: no", "PATH:12: train.momentum: must be a number >= 0 and < 1, got 'no'"),
    _edit("out of range", "  lr: 1e-3", "  lr: 1e-3\n  momentum: 1.0", "PATH:12: train.momentum: must be >= 0 and < 1, got 1.0"),
    _edit("number as bool", "{workers: 2, stages: 2}", "{use_gpu: 1}", "PATH:12: cluster.use_gpu: must be true or false, got 1"),
    _edit("number as text value", "name: sample", "name: 7", "PATH:2: name: must be text, got 7"),
    _edit("channels", "  image_size: 32", "  image_size: 32\n  channels: 4", "PATH:6: data.channels: must be one of 1, 3, got 4"),
    _edit("fraction as channels", "  image_size: 32", "  image_size: 32\n  channels: 1.0", "PATH:6: data.channels: must be one of 1, 3, got 1.0"),
    _edit("bool as channels", "  image_size: 32", "  image_size: 32\n  channels: true", "PATH:6: data.channels: must be one of 1, 3, got true"),
    _edit("item of a list", "[8, 16, 32, 64]", "[8, 16, 0, 64]", "PATH:6: model.widths.2: must be >= 1 and <= 65536, got 0"),
    _edit("no layers", "[8, 16, 32, 64], pool_after: [1]", "[]", "PATH:6: model.widths: must be a list of 1 to 1000 whole numbers >= 1 and <= 65536, got []"),
    _edit("pair of one", "  lr: 1e-3", "  lr: 1e-3\n  betas: [0.9]", "PATH:12: train.betas: must be a list of 2 numbers >= 0 and < 1, got [0.9]"),
    _edit("pair of three", "  lr: 1e-3", "  lr: 1e-3\n  betas: [0.9, 0.9, 0.9]", "PATH:12: train.betas: must be a list of 2 numbers >= 0 and < 1, got [0.9, 0.9, 0.9]"),
    _edit("stages", "stages: 2", "stages: two", "PATH:12: cluster.stages: must be auto or a whole number >= 1 and <= 65536, got 'two'"),
    _edit("no stages", "stages: 2", "stages: 0", "PATH:12: cluster.stages: must be auto or a whole number >= 1 and <= 65536, got 0"),
    _edit("loader threads", "  image_size: 32", "  image_size: 32\n  loader_threads: all", "PATH:6: data.loader_threads: must be auto or a whole number >= 0 and <= 1024, got 'all'"),
    _edit("vote", "pool_after: [1]", "vote: [1, -1]", "PATH:6: model.vote: must be one of last, equal, fitted or a list of numbers >= 0, got [1, -1]"),
    _edit("held-out share", "  image_size: 32", "  image_size: 32\n  val: {from_train: 1.5}", "PATH:6: data.val.from_train: must be > 0 and < 1, got 1.5"),
    _edit("strength of no magnitude", "  image_size: 32", "  image_size: 32\n  augment: {rand_augment: {magnitude: 31}}", "PATH:6: data.augment.rand_augment.magnitude: must be >= 0 and <= 30, got 31"),
    _edit("hue beyond the circle", "  image_size: 32", "  image_size: 32\n  augment: {color_jitter: {hue: 0.6}}", "PATH:6: data.augment.color_jitter.hue: must be >= 0 and <= 0.5, got 0.6"),
    _edit("average that never learns", "  lr: 1e-3", "  lr: 1e-3\n  ema_decay: 1", "PATH:12: train.ema_decay: must be >= 0 and < 1, got 1"),
    _edit("crop of nothing", "  image_size: 32", "  image_size: 32\n  crop_share: 0", "PATH:6: data.crop_share: must be > 0 and <= 1, got 0"),
    _edit("val of another kind", "  image_size: 32", "  image_size: 32\n  val: 0.1", "PATH:6: data.val: must be text or {from_train: SHARE}, got 0.1"),
    _edit("section as a value", "{name: hff}", "hff", "PATH:7: objective: must be a mapping of keys, got 'hff'"),
    _edit("unsafe run name", "name: sample", "name: ../sample", f"PATH:2: name: {_NAME}, got '../sample'"),
    _edit("hidden run name", "name: sample", "name: .sample", f"PATH:2: name: {_NAME}, got '.sample'"),
    _edit("long run name", "name: sample", "name: " + "n" * 101, f"PATH:2: name: {_NAME}, got '{'n' * 55}...'"),
    _edit("unsafe name in the registry", "name: sample", "name: sample\ntracking: {registered_model: a/b}", f"PATH:3: tracking.registered_model: {_NAME}, got 'a/b'"),
    _edit("empty text", "name: sample", "name: sample\ntracking: {experiment: ''}", "PATH:3: tracking.experiment: must be text, not empty, without control characters, got ''"),
)  # fmt: skip

PLACES = (
    _edit("pipe as data", "data/shards", "'pipe:cat x'", f"PATH:4: data.train: {_SCHEMES}, got 'pipe:cat x'"),
    _edit("ftp as data", "data/shards", "ftp://host/x", f"PATH:4: data.train: {_SCHEMES}, got 'ftp://host/x'"),
    _edit("file of another host", "data/shards", "file://host/x", f"PATH:4: data.train: {_SCHEMES}, got 'file://host/x'"),
    _edit("a password in a URL", "data/shards", "https://me:word@host/x", "PATH:4: data.train: must hold no user or password (credentials come from the environment), got 'https://***@host/x'"),
    _edit("a signed URL", "data/shards", "https://host/x?X-Amz-Signature=1", "PATH:4: data.train: must be a URL without ? and # (credentials come from the environment), got 'https://host/x?***'"),
    _edit("no bucket", "data/shards", "s3:///x", "PATH:4: data.train: must name a place, as s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or https://HOST/FOLDER, got 's3:///x'"),
    _edit("a way out of the bucket", "data/shards", "s3://bucket/x/../../y", "PATH:4: data.train: must name a place, as s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or https://HOST/FOLDER, got 's3://bucket/x/../../y'"),
    _edit("no port", "data/shards", "https://host:x/y", "PATH:4: data.train: must be a URL (Port could not be cast to integer value as 'x'), got 'https://host:x/y'"),
    _edit("link-local data", "data/shards", "https://169.254.169.254/x", "PATH:4: data.train: must not be a link-local address (these answer with credentials of the machine, not with data), got 'https://169.254.169.254/x'"),
    _edit("plain http", "  image_size: 32", "  image_size: 32\n  val: http://host/x", "PATH:6: data.val: must begin with https:// (http:// is for this machine alone, or with ORCHESTRATOR_ALLOW_HTTP=1), got 'http://host/x'"),
    _edit("no room in the cache", "  image_size: 32", "  image_size: 32\n  cache: {max_bytes: 0}", "PATH:6: data.cache.max_bytes: must be >= 1, got 0"),
    _edit("runs without a bucket", "name: sample", "name: sample\nruns: s3:///x", "PATH:3: runs: must name a place, as s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or https://HOST/FOLDER, got 's3:///x'"),
    _edit("a password in the place of runs", "name: sample", "name: sample\nruns: s3://me:word@bucket/x", "PATH:3: runs: must hold no user or password (credentials come from the environment), got 's3://***@bucket/x'"),
    _edit("runs on a web server", "name: sample", "name: sample\nruns: https://host/x", "PATH:3: runs: must be the path of a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER, got 'https://host/x'"),
    _edit("runs elsewhere", "name: sample", "name: sample\nruns: ftp://host/x", "PATH:3: runs: must be the path of a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER, got 'ftp://host/x'"),
    _edit("folder as tracking store", "name: sample", "name: sample\ntracking: {uri: ./mlruns}", "PATH:3: tracking.uri: must begin with one of http://, https://, sqlite://, postgresql://, mysql://, mssql://, got './mlruns'"),
    _edit("password of the tracking server", "name: sample", "name: sample\ntracking: {uri: 'http://me:word@host'}", "PATH:3: tracking.uri: must hold no password (set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), got 'http://***@host'"),
    _edit("password of the tracking database", "name: sample", "name: sample\ntracking: {uri: 'postgresql://me:word@host/db'}", "PATH:3: tracking.uri: must hold no password (PGPASSWORD or ~/.pgpass can), got 'postgresql://***@host/db'"),
    _edit("password behind the question mark", "name: sample", "name: sample\ntracking: {uri: 'mysql+pymysql://host/db?password=word'}", "PATH:3: tracking.uri: must hold no password (the option file of its client can), got 'mysql+pymysql://host/db?***'"),
)  # fmt: skip

RELATIONS = (
    _edit("epochs and steps", "epochs: 4", "epochs: 4\n  steps: 9", "PATH:8: train: must have exactly one of epochs, steps and samples, got epochs and steps"),
    _edit("three durations", "epochs: 4", "epochs: 4\n  steps: 9\n  samples: 9", "PATH:8: train: must have exactly one of epochs, steps and samples, got epochs, steps and samples"),
    _edit("no duration", "  epochs: 4\n", "", "PATH:8: train: must have exactly one of epochs, steps and samples, got none"),
    _edit("two warm-ups", "  lr: 1e-3", "  lr: 1e-3\n  warmup_epochs: 1\n  warmup_steps: 1", "PATH:8: train: must have at most one of warmup_epochs and warmup_steps, got both"),
    _edit("warm-up longer than the run", "  lr: 1e-3", "  lr: 1e-3\n  warmup_epochs: 4.5", "PATH:12: train.warmup_epochs: must not be longer than the run of 4 epochs, got 4.5"),
    _edit("warm-up longer than the steps", "  epochs: 4", "  steps: 90\n  warmup_steps: 91", "PATH:10: train.warmup_steps: must not be longer than the run of 90 steps, got 91"),
    _edit("warm-up longer than the samples", "  epochs: 4", "  samples: 850\n  warmup_steps: 10", "PATH:10: train.warmup_steps: must not be longer than the run of 9 steps, got 10"),
    Row("warm-up longer than the expected images", "--set: train.warmup_steps: must not be longer than the run of 40 steps, got 41",
        overrides=("data.expect={train_samples: 1000, classes: 10}", "train.warmup_steps=41")),
    Row("warm-up of epochs longer than the steps", "--set: train.warmup_epochs: must not be longer than the run of about 0.4 epochs, got 1",
        old="epochs: 4", new="steps: 4", overrides=("data.expect={train_samples: 1000, classes: 10}", "train.warmup_epochs=1")),
    _edit("batch not divisible by replicas", "{workers: 2, stages: 2}", "{workers: 3, stages: 1}", "PATH:10: train.global_batch_size: must be a multiple of the 3 replicas (3 workers / 1 stages), got 100; nearest: 99 and 102"),
    Row("batch not divisible, one block, stages auto", "PATH:10: train.global_batch_size: must be a multiple of the 3 replicas (3 workers / 1 stages), got 100; nearest: 99 and 102", old="{name: hff}", new="{name: hff, block_size: 4}", overrides=("cluster={workers: 3}",)),
    _edit("replicas that do not divide the batch", "{workers: 2, stages: 2}", "{workers: 4, replicas: [1, 3]}", "PATH:12: cluster.replicas: must divide train.global_batch_size (100), got 3; nearest: 2 and 4"),
    _edit("more replicas than the batch", "{workers: 2, stages: 2}", "{workers: 101, replicas: [101]}", "PATH:12: cluster.replicas: must divide train.global_batch_size (100), got 101; nearest: 100"),
    _edit("replicas of other stages", "{workers: 2, stages: 2}", "{workers: 3, stages: 3, replicas: [2, 1]}", "PATH:12: cluster.replicas: must have one number for each of the 3 stages, got [2, 1]"),
    _edit("replicas of other workers", "{workers: 2, stages: 2}", "{workers: 4, replicas: [2, 1]}", "PATH:12: cluster.replicas: must add up to cluster.workers (4), got [2, 1]: 3"),
    _edit("replicas of more stages than layers", "{workers: 2, stages: 2}", "{workers: 5, replicas: [1, 1, 1, 1, 1]}", "PATH:12: cluster.replicas: must have at most 4 numbers, one for each of the layers, got [1, 1, 1, 1, 1]"),
    _edit("replicas of no stage", "{workers: 2, stages: 2}", "{replicas: []}", "PATH:12: cluster.replicas: must be a list of 1 to 1000 whole numbers >= 1, got []"),
    _edit("a range of workers upside down", "{workers: 2, stages: 2}", "{workers: {min: 3, max: 2}}", "PATH:12: cluster.workers: must have a min of at most max, got {min: 3, max: 2}"),
    _edit("replicas of a range of workers", "{workers: 2, stages: 2}", "{workers: {min: 1, max: 2}, replicas: [2]}", "PATH:12: cluster.replicas: must be left out with a range of workers, got [2]"),
    _edit("a range of workers below the stages", "{workers: 2, stages: 2}", "{workers: {min: 1, max: 2}, stages: 2}", "PATH:12: cluster.workers: must have a min of at least cluster.stages (2), got 1"),
    _edit("a range of workers without Ray", "{workers: 2, stages: 2}", "{workers: {min: 1, max: 2}, launcher: process}", "PATH:12: cluster.workers: must be a number with cluster.launcher process, got {min: 1, max: 2}"),
    _edit("layers of other stages", "{workers: 2, stages: 2}", "{workers: 3, stages: 3, layers: [2, 2]}", "PATH:12: cluster.layers: must have one number for each of the 3 stages, got [2, 2]"),
    _edit("layers of other replicas", "{workers: 2, stages: 2}", "{workers: 2, replicas: [2], layers: [2, 2]}", "PATH:12: cluster.layers: must have as many numbers as cluster.replicas (1), got [2, 2]"),
    _edit("layers of another network", "{workers: 2, stages: 2}", "{workers: 2, layers: [2, 3]}", "PATH:12: cluster.layers: must add up to 4, the number of layers, got [2, 3]: 5"),
    _edit("layers of more stages than workers", "{workers: 2, stages: 2}", "{workers: 1, layers: [2, 2]}", "PATH:12: cluster.layers: must have at most 1 numbers, as many as cluster.workers, got [2, 2]"),
    Row("more micro-batches than pairs of samples", "--set: train.micro_batches: must be at most 50, two samples of train.global_batch_size (100) in each, got 51", overrides=("train.micro_batches=51",)),
    Row("micro-batches for no limit", "--set: train.micro_batches: must be a number without cluster.memory_gb, got 'auto'", overrides=("train.micro_batches=auto",)),
    _edit("no memory", "{workers: 2, stages: 2}", "{memory_gb: 0}", "PATH:12: cluster.memory_gb: must be > 0, got 0"),
    _edit("batch smaller than the replicas", "{workers: 2, stages: 2}", "{workers: 128, stages: 1}", "PATH:10: train.global_batch_size: must be a multiple of the 128 replicas (128 workers / 1 stages), got 100; nearest: 128"),
    Row("batch of more than the images", "PATH:10: train.global_batch_size: must be at most the 99 training samples, got 100", overrides=("data.expect={train_samples: 99, classes: 2}",)),
    Row("batch of more than the images that are not held out", "--set: train.global_batch_size: must be at most about 1348, the training samples that are not held out, got 5000", overrides=("data=digits", "train.global_batch_size=5000")),
    Row("batch of more than the images that no vote is fitted on", "PATH:10: train.global_batch_size: must be at most about 90, the training samples that are not held out, got 100", overrides=("data.expect={train_samples: 100, classes: 2}", "model.vote=fitted")),
    Row("a step that is no number", "--set: train.init_from: must be RUN or RUN@STEP, got 'b@x'", overrides=("train.init_from=b@x",)),
    Row("a step of no run", "--set: train.init_from: must be RUN or RUN@STEP, got '@5'", overrides=("train.init_from='@5'",)),
    _edit("batch of one", "global_batch_size: 100", "global_batch_size: 1", "PATH:10: train.global_batch_size: must be at least 2 with norm batch, got 1"),
    _edit("more stages than layers", "{workers: 2, stages: 2}", "{workers: 8, stages: 8}", "PATH:12: cluster.stages: must be at most 4, the number of layers, got 8"),
    Row("more stages than blocks", "PATH:12: cluster.stages: must be at most 1, the number of blocks of 4 layers, got 2", old="{name: hff}", new="{name: hff, block_size: 4}"),
    _edit("fewer workers than stages", "{workers: 2, stages: 2}", "{workers: 3, stages: 4}", "PATH:12: cluster.workers: must be at least cluster.stages (4), got 3; nearest: 4"),
    _edit("bp in stages", "{name: hff}", "{name: bp}", "PATH:12: cluster.stages: must be 1 or auto with objective bp, got 2"),
    _edit("ff in stages", "arch: vgg, widths: [8, 16, 32, 64], pool_after: [1]}\nobjective: {name: hff}", "arch: mlp, widths: [8, 16], norm: none}\nobjective: {name: ff}", "PATH:12: cluster.stages: must be 1 or auto with objective ff, got 2"),
    Row("ff with a norm", "PATH:6: model.norm: must be none with objective ff (a norm takes goodness away; lengths are normalised between layers), got 'batch'", old="{name: hff}", new="{name: ff}", overrides=("cluster.stages=1",)),
    Row("ff with layers on several stages", "--set: cluster.layers: must have one number with objective ff (one stage), got [2, 2]", old="{name: hff}", new="{name: ff}", overrides=("cluster.stages=auto", "model.norm=none", "cluster.layers=[2, 2]")),
    Row("ff with replicas on several stages", "--set: cluster.replicas: must have one number with objective ff (one stage), got [1, 1]", old="{name: hff}", new="{name: ff}", overrides=("cluster.stages=auto", "model.norm=none", "cluster.replicas=[1, 1]")),
    Row("bp layer by layer", "--set: train.schedule: must be simultaneous with objective bp, got 'sequential'", old="{name: hff}", new="{name: bp}", overrides=("cluster.stages=1", "train.schedule=sequential")),
    _edit("pooled to nothing", "pool_after: [1]", "pool_after: [0, 1, 2, 3], first_stride: 8", "PATH:6: model: must fit images of 3x32x32, got: the map is pooled to nothing after layer 2; use fewer entries in pool_after or a larger image_size"),
    _edit("pooling after no layer", "pool_after: [1]", "pool_after: [4]", "PATH:6: model: must fit images of 3x32x32, got: pool_after must number layers from 0 to 3, got 4"),
    _edit("votes of other layers", "pool_after: [1]", "vote: [1, 2, 3]", "PATH:6: model.vote: must have one weight for each of the 4 layers, got 3"),
    _edit("votes of nobody", "pool_after: [1]", "vote: [0, 0, 0, 0]", "PATH:6: model.vote: must have a weight > 0, got [0.0, 0.0, 0.0, 0.0]"),
    _edit("a resnet that narrows", "arch: vgg, widths: [8, 16, 32, 64]", "arch: resnet, widths: [8, 32, 16, 64]", "PATH:6: model: must fit images of 3x32x32, got: widths of a resnet must not fall, got [8, 32, 16, 64]"),
    _edit("a grid larger than the map", "pool_after: [1]", "first_stride: 2, head_grid: 17", "PATH:6: model.head_grid: must be at most 16, the side of the largest map behind a layer, got 17"),
    _edit("negative similarity", "{name: hff}", "{name: hff, similarity: -1}", "PATH:7: objective.similarity: must be >= 0, got -1"),
    Row("hidden convolutions of vectors", "PATH:7: objective.aux_convs: must be 0 with arch mlp, whose layers have no maps, got 2", old="arch: vgg, widths: [8, 16, 32, 64], pool_after: [1]}\nobjective: {name: hff}", new="arch: mlp, widths: [8, 16]}\nobjective: {name: ce, aux_convs: 2}"),
    _edit("super-classes for every layer", "{name: hff}", "{name: hff, coarse: [2, 3, 4, 5]}", "PATH:7: objective.coarse: must have at most 3, since the last of the 4 layers learns all classes, got 4"),
    Row("more super-classes than classes", "PATH:7: objective.coarse.1: must be at most 7, the number of classes, got 8", old="{name: hff}", new="{name: hff, coarse: [3, 8]}", overrides=("data.expect={train_samples: 100, classes: 7}",)),
    _edit("one super-class", "{name: hff}", "{name: hff, coarse: [1]}", "PATH:7: objective.coarse.0: must be >= 2, got 1"),
    _edit("mean of other channels", "  image_size: 32", "  image_size: 32\n  mean: [0.5]", "PATH:6: data.mean: must have one number per channel (3), got 1"),
    _edit("spread of other channels", "  image_size: 32", "  image_size: 32\n  channels: 1\n  std: [1, 1, 1]", "PATH:7: data.std: must have one number per channel (1), got 3"),
    _edit("scale out of its bounds", "{name: hff}", "{name: hff, scale: 8}", "PATH:7: objective.scale: must be from scale_min (16) to scale_max (64), got 8"),
    _edit("scale bounds the wrong way", "{name: hff}", "{name: hff, scale_min: 100}", "PATH:7: objective.scale_min: must be at most objective.scale_max (64), got 100"),
    _edit("scale that learns from its bound on", "{name: hff}", "{name: hff, scale: 16}", "PATH:7: objective.scale: must lie inside its bounds while it learns (or set objective.learn_scale: false), got 16"),
    _edit("scale of a layer that learns from its bound on", "{name: hff}", "{name: hff}\nper_layer: [null, {scale: 64}]", "PATH:8: per_layer.1.scale: must lie inside its bounds while it learns (or set objective.learn_scale: false), got 64"),
    Row("smoothing of a layer that has none", "--set: per_layer.0.label_smoothing: must be left out (objective ff has none), got 0.1",
        old="arch: vgg, widths: [8, 16, 32, 64], pool_after: [1]}\nobjective: {name: hff}", new="arch: mlp, widths: [8, 16], norm: none}\nobjective: {name: ff}", overrides=("cluster.stages=1", "per_layer=[{label_smoothing: 0.1}]")),
    _edit("areas the wrong way", "  image_size: 32", "  image_size: 32\n  augment: {resized_crop: [1, 0.5]}", "PATH:6: data.augment.resized_crop: must be [least area, greatest area], got [1.0, 0.5]"),
    _edit("two crops", "  image_size: 32", "  image_size: 32\n  augment: {resized_crop: [0.5, 1], crop_padding: 4}", "PATH:6: data.augment.crop_padding: must be 0 beside resized_crop, got 4"),
    _edit("hole larger than the image", "  image_size: 32", "  image_size: 32\n  augment: {cutout: 33}", "PATH:6: data.augment.cutout: must be at most data.image_size (32), got 33"),
    _edit("hue of gray images", "  image_size: 32", "  image_size: 32\n  channels: 1\n  augment: {color_jitter: {hue: 0.1}}", "PATH:7: data.augment.color_jitter.hue: must be 0 with data.channels 1, got 0.1"),
    Row("mixed images for ff", "--set: data.augment.mixup: must be 0 with objective ff, which draws one label in, got 0.2",
        old="arch: vgg, widths: [8, 16, 32, 64], pool_after: [1]}\nobjective: {name: hff}", new="arch: mlp, widths: [8, 16], norm: none}\nobjective: {name: ff}", overrides=("cluster.stages=1", "data.augment.mixup=0.2")),
    Row("mixed images with a similarity term", "--set: data.augment.mixup: must be 0 with objective.similarity, which knows one label, got 0.2",
        overrides=("objective.similarity=0.5", "data.augment.mixup=0.2")),
    Row("growing images of a length in steps", "--set: data.progressive: must be left out unless train.epochs gives the length, got 16 pixels",
        old="  epochs: 4", new="  steps: 4", overrides=("data.progressive={from_size: 16}",)),
    Row("images that shrink", "--set: data.progressive.from_size: must be at most data.image_size (32), got 33", overrides=("data.progressive={from_size: 33}",)),
    Row("images too small for the heads", "--set: data.progressive.from_size: must be at least 8 (a smaller model.head_grid or fewer pool_after allow less), got 6", overrides=("data.progressive={from_size: 6}",)),
    _edit("expected classes of digits", "  train: data/shards", "  train: digits\n  expect: {train_samples: 1797, classes: 11}", "PATH:5: data.expect.classes: must be 10 for digits, got 11"),
    _edit("expected images of digits", "  train: data/shards", "  train: digits\n  expect: {train_samples: 1796, classes: 10}", "PATH:5: data.expect.train_samples: must be 1797 for digits, got 1796"),
    _edit("one class", "  image_size: 32", "  image_size: 32\n  expect: {train_samples: 10, classes: 1}", "PATH:6: data.expect.classes: must be >= 2, got 1"),
    _edit("expected images of no data", "  image_size: 32", "  image_size: 32\n  expect: {train_samples: 1000, val_samples: 3, classes: 2}", "PATH:6: data.expect.val_samples: must be left out when data.val is no data set, got 3"),
    _edit("nccl without GPU", "{workers: 2, stages: 2}", "{workers: 2, transport: nccl}", "PATH:12: cluster.transport: must be auto, shm or gloo without cluster.use_gpu, got 'nccl'"),
)  # fmt: skip

OVERRIDES = (
    _set("value out of range", "train.lr=-1", "--set: train.lr: must be > 0, got -1"),
    _set("value of another type", "train.lr=1e-3x", "--set: train.lr: must be a number > 0, got '1e-3x'"),
    _set("bool as a number in --set", "train.lr=yes", "--set: train.lr: must be a number > 0, got 'yes'"),
    _set("no value", "train.lr=", "--set: train.lr: must be a number > 0, got nothing"),
    _set("no equals sign", "train.lr", "--set: must be key.path=value, got 'train.lr'"),
    _set("no key", "=1", "--set: must be key.path=value, got '=1'"),
    _set("unknown path", "train.learn=1", "--set: train.learn: must be a key of a job, got 'train.learn'; did you mean 'train.lr'?"),
    _set("last word alone", "lr=1", "--set: lr: must be a key of a job, got 'lr'; did you mean 'train.lr'?"),
    _set("last word with a slip", "epoch=1", "--set: epoch: must be a key of a job, got 'epoch'; did you mean 'train.epochs'?"),
    _set("another tool's word", "train.learning_rate=1", "--set: train.learning_rate: must be a key of a job, got 'train.learning_rate'; did you mean 'train.lr'?"),
    _set("another tool's word alone", "learning_rate=1", "--set: learning_rate: must be a key of a job, got 'learning_rate'; did you mean 'train.lr'?"),
    _set("key of another section", "data.seed=1", "--set: data.seed: must be a key of a job, got 'data.seed'; did you mean 'train.seed'?"),
    _set("unknown section", "x.y=1", "--set: x.y: must be a key of a job, got 'x.y'"),
    _set("path into a value", "name.x=1", "--set: name.x: must be a key of a job, got 'name.x'; did you mean 'name'?"),
    _set("path into a list", "model.widths.0=1", "--set: model.widths.0: must be a key of a job, got 'model.widths.0'; did you mean 'model.widths'?"),
    _set("open bracket in --set", "model.widths=[1", "--set: model.widths: must close the bracket '[', got no end up to line 1"),
    _set("nan in --set", "train.lr=.nan", "--set: train.lr: must be a finite number, got .nan"),
    _set("alias in --set", "train.lr=*a", "--set: train.lr: must be written out (no aliases), got the alias *a"),
    _set("two documents in --set", "train.lr=1\n---\n2", "--set: train.lr: must be one document, got a second one"),
    _set("unknown key in a mapping", "objective={name: hff, margn: 1}", "--set: objective.margn: must be a known key, got 'margn'; did you mean 'margin'?"),
    _set("key of another architecture in --set", "model.dropout=0.1", "--set: model.dropout: must be a known key, got 'dropout' (known: vote, arch, widths, pool_after, first_kernel, first_stride, head_grid, norm)"),
    _set("relation with the file", "cluster.workers=1", "--set: cluster.workers: must be at least cluster.stages (2), got 1; nearest: 2"),
)  # fmt: skip

ROWS = (*FILES, *YAML_FEATURES, *KEYS, *VALUES, *PLACES, *RELATIONS, *OVERRIDES)


@dataclass(frozen=True)
class BadJob:
    """A bad job on disk: `path` and `overrides` for the command line, and the whole error text."""

    path: Path
    overrides: tuple[str, ...]
    message: str


def pytest_generate_tests(metafunc: Any) -> None:
    if "bad_job" in metafunc.fixturenames:
        metafunc.parametrize("bad_job", ROWS, indirect=True, ids=[row.name for row in ROWS])


@pytest.fixture
def bad_job(request: pytest.FixtureRequest, tmp_path: Path) -> BadJob:
    row: Row = request.param
    content = GOOD.replace(row.old, row.new) if row.content is None else row.content
    path = tmp_path / "x.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return BadJob(path, row.overrides, row.message.replace("PATH", str(path)))


@pytest.fixture
def good_text() -> str:
    return GOOD
