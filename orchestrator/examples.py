"""What `--help` ends with: examples for every command, and what else there is to know."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

_TOP = """\
examples:
  orchestrator run jobs/quickstart.yaml                   train; again: resume, or say that it is finished
  orchestrator run jobs/mnist.yaml --set train.lr=2e-3    change one value
  orchestrator check jobs/imagenet.yaml                   the mistakes in a job file, offline
  orchestrator plan jobs/imagenet.yaml --workers 2,4,8    who would own which layers
  orchestrator data pack my-images/ data/my-images        image folder -> WebDataset shards and index
  orchestrator run jobs/search-digits.yaml                many trials, the best one as a job file; again: go on
  orchestrator submit jobs/mnist.yaml --dry-run           what would be sent to a cluster (Ray, KubeRay, Slurm)
  orchestrator report runs/quickstart                     one HTML page
  orchestrator predict runs/mine cat.jpg                  the likeliest classes and every layer's vote
  orchestrator export runs/mine --format onnx             the network for other programs

Every command has examples of its own: orchestrator run --help.
exit codes: 0 done, 2 bad job file or command, 3 bad data, 4 bad or missing run or checkpoint,
            75 interrupted and resumable, 1 anything else
"""

_RUN = """\
examples:
  orchestrator run jobs/quickstart.yaml                                train; Ctrl-C saves, the same command goes on
  orchestrator run jobs/mnist.yaml --set train.lr=2e-3 --set name=b    another value, another run
  orchestrator run jobs/mnist.yaml --set cluster.launcher=process      on this machine without Ray
  orchestrator run jobs/mnist.yaml --seeds 0,1,2 --summary seeds.json  three runs, mean and deviation
  orchestrator run jobs/quickstart.yaml --resume never                 afresh; the earlier folder is renamed

All keys of a job, with types and defaults, are in docs/job-reference.md.
"""

_CHECK = """\
examples:
  orchestrator check jobs/imagenet.yaml                                offline; data need not be there
  orchestrator check jobs/mnist.yaml --set train.lr=1e-2 --set cluster.workers=4

Where a local index lies at data.train, data.val or data.test, it is held against data.expect.
"""

_PLAN = """\
examples:
  orchestrator plan jobs/imagenet.yaml                                 stages, memory and speed of the job's workers
  orchestrator plan jobs/imagenet.yaml --workers 1,2,4,8,16            where it stops scaling
  orchestrator plan jobs/quickstart.yaml --profile                     layers measured here, not estimated
  orchestrator plan jobs/imagenet.yaml --workers 8 --json plan.json --price-per-hour 2.5
"""

_SUBMIT = """\
examples:
  orchestrator submit jobs/mnist.yaml --dry-run                             what would be sent, and how much
  orchestrator submit jobs/mnist.yaml --address http://HEAD:8265            a Ray cluster; its log and exit code here
  orchestrator submit jobs/imagenet.yaml --to kuberay --site site.yaml \\
      --set data.train=/shared/imagenet/train --set data.val=/shared/imagenet/val --set runs=/shared/runs
  orchestrator submit jobs/imagenet.yaml --to slurm --dry-run > imagenet.sh the batch script, to read or to change

Nodes, CPUs and GPUs that are asked for are those of the job's `cluster` section. The same command again resumes the
run. Files for whole clusters (ray up, KubeRay, Slurm, compose) are in infra/, step by step in docs/clusters.md.
"""

_PACK = """\
examples:
  orchestrator data pack my-images/ data/mine                          my-images/CLASS/IMAGE.jpg or .png
  orchestrator data pack flowers.tar.gz data/flowers --max-side 256    a tar of that; larger images made smaller
  orchestrator data pack ILSVRC2012_img_train.tar data/imagenet-train  as downloaded, nothing unpacked
  orchestrator data pack ILSVRC2012_img_val.tar data/imagenet-val \\
      --labels ILSVRC2012_devkit_t12.tar.gz --classes data/imagenet-train
"""

_COMPLETION = """\
examples:
  source <(orchestrator completion bash)                               in this shell; in ~/.bashrc for every one
  orchestrator completion zsh > ~/.zfunc/_orchestrator                 a folder that is in $fpath
"""

EXAMPLES = {
    "": _TOP,
    "run": _RUN,
    "check": _CHECK,
    "plan": _PLAN,
    "submit": _SUBMIT,
    "completion": _COMPLETION,
    "data pack": _PACK,
    "data index": """\
example:
  orchestrator data index data/foreign          shards of another tool; they stay as they are
""",
    "data verify": """\
examples:
  orchestrator data verify data/mine            every hash, count and label
  orchestrator data verify data/mine --decode   every image too
  orchestrator data verify data/mine --fix      name bad samples in quarantine.json
""",
    "data stats": """\
examples:
  orchestrator data stats data/mine
  orchestrator data stats data/mine --html stats.html
""",
    "data features": """\
example:
  orchestrator data features jobs/transfer-imagenet.yaml      ahead of `run`, which would compute them itself
""",
    "eval": """\
examples:
  orchestrator eval runs/mine                   on the job's validation data
  orchestrator eval runs/mine --data data/other --json result.json
  orchestrator eval runs/mine --probe           what a linear classifier reads from each layer
""",
    "predict": """\
examples:
  orchestrator predict runs/mine cat.jpg dog.png
  orchestrator predict runs/mine cat.jpg --top 3 --json -
""",
    "export": """\
examples:
  orchestrator export runs/mine --format torch-export
  orchestrator export runs/mine --format onnx --out mine.onnx
""",
    "report": """\
examples:
  orchestrator report runs/mine                 writes runs/mine/report.html
  orchestrator report runs/mine runs/other --out both.html
""",
    "runs ls": """\
example:
  orchestrator runs ls runs --json
""",
    "runs show": """\
example:
  orchestrator runs show runs/mine
""",
    "runs verify": """\
example:
  orchestrator runs verify runs/mine            exit code 4 where a hash is wrong
""",
    "runs replay": """\
example:
  orchestrator runs replay runs/mine            after MLflow's server was away
""",
    "runs compare": """\
example:
  orchestrator runs compare runs/mine runs/other
""",
    "runs prune": """\
examples:
  orchestrator runs prune runs/mine             shows what goes and what stays, and asks
  orchestrator runs prune runs/mine runs/other --keep 2 --dry-run
  orchestrator runs prune runs/mine --yes --json
""",
    "runs rm": """\
examples:
  orchestrator runs rm runs/mine                asks first
  orchestrator runs rm runs/mine runs/other --yes
""",
}


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser itself under the name "", and those of all commands and actions below it: `data pack`."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from commands(below, f"{name} {word}".strip())


def add_examples(parser: argparse.ArgumentParser) -> None:
    """Let the help of every command end with its examples."""
    for name, command in commands(parser):
        if name in EXAMPLES:
            command.epilog = EXAMPLES[name]
            command.formatter_class = argparse.RawDescriptionHelpFormatter
