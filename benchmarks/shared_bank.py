"""One bank of prototypes for all layers, trained by one of them, against prototypes of every layer's own.

    python -m benchmarks.shared_bank TRAIN TEST --name NAME [--keep FOLDER]

TRAIN and TEST are what `orchestrator data pack` takes, or its output. The network, images and length are those of
`benchmarks.levers`, whose row `hff` is `own` here. In all other rows but one the prototypes lie in one space for all
layers, and a layer reaches it by a 1 x 1 convolution (no bias) of its pooled map. The layer that owns the bank trains
it; all others get it with the batch, as it was before that step's update, as a constant. It can then travel with the
activations, if its owner is the first layer: the bank of the last one is a look at what a later owner would be worth,
since it would flow against the pipeline. A random bank that nobody trains needs no owner.

An experiment, kept for its measurement; not part of the method.

Shape letters: B batch, C classes, M prototypes per class, D features of a layer, W their channels, N cells, K channels
of the common space, S = K N its numbers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import publish
from benchmarks.levers import WIDTHS, job, paired, words
from benchmarks.objectives import packed
from hff.layers import LocalLayer
from hff.local import make_optimizer
from hff.objectives import PrototypeHead
from hff.randomness import derive_seed, seeded
from hff.sphere import cosines, normalise, soft_maximum


@dataclass(frozen=True)
class Sharing:
    """Who trains the prototypes: a layer for all, `each` its own, or `nobody`; and the channels of their space.

    Without `channels` the space is that of the owner's own features, and the owner has no adapter.
    """

    trained_by: int | str
    channels: int | None = None


OWN = "own"
ROWS: dict[str, Sharing | None] = {
    OWN: None,
    "bank of the first layer": Sharing(0),
    "bank of the first layer, 32 channels": Sharing(0, 32),
    "random bank, 32 channels": Sharing("nobody", 32),
    "own, 32 channels": Sharing("each", 32),
    "bank of the last layer": Sharing(3),
}


class Adapter(nn.Module):
    """A 1 x 1 convolution of a pooled map that has been flattened: (B, W N) to (B, K N)."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.width = width
        self.mix = nn.Linear(width, channels, bias=False)

    def forward(self, feature_BD: Tensor) -> Tensor:
        cell_BNW = feature_BD.unflatten(1, (self.width, -1)).transpose(1, 2)
        space_BS: Tensor = self.mix(cell_BNW).transpose(1, 2).flatten(1)
        return space_BS


class AdaptedHead(PrototypeHead):
    """Prototypes in a space that may be common to layers, trained here or lent by the head that owns them."""

    def __init__(
        self, num_classes: int, *, grid: int, space: int, adapter: nn.Module, owner: AdaptedHead | None, **options: Any
    ) -> None:
        super().__init__(space, num_classes, grid=grid, **options)
        self.adapter = adapter
        # In a tuple, so that the owner is no part of this head.
        self._owner = () if owner is None else (owner,)
        if owner is not None:
            self.prototypes.requires_grad_(False)
        self._sent_CMD = super().unit_prototypes().detach()

    def lent(self, training: bool) -> Tensor:
        """The bank as it is sent, a constant: in training as it was before the update of the step."""
        return self._sent_CMD if training else super().unit_prototypes().detach()

    def unit_prototypes(self) -> Tensor:
        return self._owner[0].lent(self.training) if self._owner else super().unit_prototypes()

    def logits(self, feature_BD: Tensor) -> Tensor:
        if self.training and not self._owner:
            self._sent_CMD = super().unit_prototypes().detach()
        proto_CMS = self.unit_prototypes() if self._owner else self.prototypes
        return self.scale * soft_maximum(cosines(normalise(self.adapter(feature_BD)), proto_CMS), self.sharpness)


def share(layers: Sequence[LocalLayer], sharing: Sharing, seed: int, **options: Any) -> None:
    """Give convolutional layers heads that share their prototypes; owners come into being before who borrows."""
    by, channels = sharing.trained_by, sharing.channels
    first: PrototypeHead = layers[0].head  # type: ignore[assignment]
    cells, classes = first.grid**2, first.num_classes
    widths = [layer.head.features // cells for layer in layers]
    space_channels = widths[int(by)] if channels is None else channels
    owner: AdaptedHead | None = None
    for index in sorted(range(len(layers)), key=lambda i: i != by):
        with seeded(derive_seed(seed, "shared bank", index)):
            own_space = index == by and channels is None
            adapter = nn.Identity() if own_space else Adapter(widths[index], space_channels)
            head = AdaptedHead(
                classes, grid=first.grid, space=space_channels * cells, adapter=adapter, owner=owner, **options
            )
        layers[index].head = head
        if by == "nobody":
            head.prototypes.requires_grad_(False)
        if by != "each" and owner is None:
            owner = head


def head_parameters(layers: Sequence[LocalLayer]) -> int:
    """Numbers that the heads learn; a bank counts for its owner alone."""
    return sum(p.numel() for layer in layers for p in layer.head.parameters() if p.requires_grad)


def trained(values: Mapping[str, Any], sharing: Sharing | None) -> dict[str, Any]:
    """Accuracy of every layer behind the last step of a job in this process, and what it cost."""
    from orchestrator.pipeline.stage import Stage
    from orchestrator.run import network
    from orchestrator.run.context import Control
    from orchestrator.run.datasets import Normalise, TrainFeed, eval_batches, open_datasets, train_stream
    from orchestrator.run.device import prepare_torch
    from orchestrator.run.evaluate import evaluate
    from orchestrator.run.schedule import make_schedule

    data, train, device = values["data"], values["train"], torch.device("cpu")
    prepare_torch(values["cluster"], device)
    datasets = open_datasets(dict(values))
    assert datasets.val is not None
    shape, classes = (data["channels"], data["image_size"], data["image_size"]), len(datasets.classes)
    layers = network.build(
        values["model"], values["objective"], input_shape=shape, num_classes=classes, seed=train["seed"]
    )
    if sharing is not None:
        share(layers, sharing, train["seed"])
    layers = [layer.to(memory_format=torch.channels_last) for layer in layers]
    stream = train_stream(datasets, dict(values), replica=0, replicas=1)
    schedule = make_schedule(train, values["checkpoint"], steps_per_epoch=stream.steps_per_epoch, layers=len(layers))
    stage = Stage(
        first=0,
        layers=layers,
        optimizers=[make_optimizer(x, "adamw", lr=train["lr"], weight_decay=train["weight_decay"]) for x in layers],
        receiver=None,
        sender=None,
        learning_rate=schedule.learning_rate,
        trained=schedule.trained,
        output_shape=(),
        device=device,
    )
    ready = Normalise(data, device, torch.float32)
    began = time.process_time()
    feed = TrainFeed(stream, ready, 0, schedule.total_steps, lambda: False)
    for _ in range(schedule.total_steps):
        stage.train_step(feed.next())
    feed.close()
    seconds = time.process_time() - began
    result = evaluate(
        stage,
        eval_batches(datasets.val, dict(values), ready, batch_size=stream.max_batch, replica=0, replicas=1),
        vote_weights=network.votes(values["model"], len(layers), len(layers)),
        num_classes=classes,
        is_last=True,
        control=Control(1),
    )
    bank = layers[0].head.prototypes.numel() if sharing is not None and sharing.trained_by == 0 else 0
    return {
        "by layer": list(result.layer_top1.values()),
        "head parameters": head_parameters(layers),
        "sent, kB": 4e-3 * int(bank),
        "processor_s": seconds,
    }


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    top1 = {label: [100 * result["by layer"][-1] for result in own] for label, own in found.items()}
    return [
        {
            "prototypes": label,
            "head parameters": own[0]["head parameters"],
            "top-1, %": words(top1[label]),
            f"against {OWN}": "" if label == OWN else paired(top1[label], top1[OWN]),
            "by layer, %": " ".join(
                f"{100 * statistics.fmean(layer):.1f}" for layer in zip(*(r["by layer"] for r in own), strict=True)
            ),
            "bank sent with each batch, kB": f"{own[0]['sent, kB']:.1f}" if own[0]["sent, kB"] else "",
            "processor s": words([r["processor_s"] for r in own], 0),
        }
        for label, own in found.items()
    ]


def measure(folder: Path, given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All seeds of every row; seeds outside, so that what is there after a stop is comparable."""
    from orchestrator.job.resolved import job_to_dict

    folder.mkdir(parents=True, exist_ok=True)
    train, test = (packed(source, folder / part) for source, part in ((given.train, "train"), (given.test, "test")))
    data = {"train": str(train), "val": str(test), "image_size": given.image_size}
    data["augment"] = {"crop_padding": 4, "flip": True}
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in ROWS if label in (OWN, *given.only)}
    for seed in range(given.seeds):
        values = job_to_dict(job("own", {"train": {"seed": seed}}, data, folder, given))
        for label in found:
            kept = folder / f"{label.replace(' ', '-').replace(',', '')}-{seed}.json"
            if not kept.exists():
                kept.write_text(json.dumps(trained(values, ROWS[label])))
            found[label].append(json.loads(kept.read_text()))
            print(f"{label}, seed {seed}: {100 * found[label][-1]['by layer'][-1]:.2f}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="images to learn")
    parser.add_argument("test", help="images to test on")
    parser.add_argument("--name", required=True, help="the data's name, in the title and in the file of the result")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--grid", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--keep", type=Path, help="keep shards and results here; finished trainings are not run again")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure((given.keep or Path(scratch)).absolute(), given)
    length = f"--epochs {given.epochs} --seeds {given.seeds}"
    if len(found) < len(ROWS):
        length += f" --only {shlex.join(label for label in found if label != OWN)}"
    publish(
        f"shared_bank_{given.name}",
        f"python -m benchmarks.shared_bank TRAIN TEST --name {given.name} {length}",
        f"One bank of prototypes for all layers on {given.name}",
        table(found),
        [
            f"{given.epochs} epochs at {given.image_size} pixels, batch of 100, AdamW, lr {given.lr:g}, one-cycle, one "
            f"thread; {given.seeds} seeds, mean +- sample deviation; differences are of the same seeds, with "
            "their standard error",
            f"widths {WIDTHS['widths']}, pooled after {WIDTHS['pool_after']}, one prototype per class; all S0: "
            "an adapter and a bank are one linear map of the layer's features",
            "adapters are 1 x 1 convolutions of the pooled maps; a layer that does not own the bank gets it as a "
            "constant; the processor's time is that of the training alone",
        ],
    )


if __name__ == "__main__":
    main()
