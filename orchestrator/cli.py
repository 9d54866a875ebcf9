"""The command line: words to calls, errors to exit codes. Everything heavy is imported where it is used."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.data import arguments as arguments_of_data
from orchestrator.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_OTHER, JobError, OrchestratorError
from orchestrator.examples import add_examples
from orchestrator.launch.signals import INTERRUPTED, interrupting
from orchestrator.parser import Parser
from orchestrator.show.listings import run_arguments
from orchestrator.show.listings.run_arguments import run_here, whole_number
from orchestrator.storage import result_file


def make_parser() -> argparse.ArgumentParser:
    """The words of all commands."""
    parser = Parser(
        prog="orchestrator",
        description="Train greedy, layer-local networks: one YAML, one machine or a Ray cluster.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    job = Parser(add_help=False)
    job.add_argument("job", metavar="JOB", help="a job file (YAML)")
    job.add_argument(
        "--set",
        dest="overrides",
        metavar="A.B=C",
        action="append",
        default=[],
        help="change one value of the job; may be given several times; relative paths begin where those of the file do",
    )

    run = commands.add_parser(
        "run", parents=[job], help="train, transfer or search; resumes an unfinished run of this name"
    )
    run.add_argument("--seeds", metavar="S,S,..", help="one run per seed, named NAME-seed-S, with mean and deviation")
    run.add_argument("--summary", metavar="FILE", type=result_file, help="also write summary.json here")
    run.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto: go on where there is a checkpoint (default); never: start afresh, the earlier folder is "
        "renamed; must: fail without a checkpoint",
    )

    commands.add_parser("check", parents=[job], help="validate a job file offline, without torch")

    plan = commands.add_parser("plan", parents=[job], help="layers, memory and share of compute per stage")
    plan.add_argument("--workers", metavar="N[,N...]", help="instead of the job's own number")
    plan.add_argument(
        "--profile", action="store_true", help="measure the layers here instead of estimating them (needs torch)"
    )
    plan.add_argument("--price-per-hour", metavar="X", help="of one worker; adds what an epoch costs")
    plan.add_argument("--json", metavar="FILE", type=result_file, help="also write the plan as JSON (- for stdout)")

    submit = commands.add_parser(
        "submit",
        parents=[job],
        help="send the job to a cluster: Ray, KubeRay or Slurm",
        description="Send the job to a cluster that somebody else runs. It is validated here first.",
    )
    submit.add_argument(
        "--to",
        choices=("ray", "kuberay", "slurm"),
        default="ray",
        help="ray: a running Ray cluster, the log comes here (default); kuberay: a RayJob through kubectl; "
        "slurm: a batch script through sbatch",
    )
    submit.add_argument("--address", metavar="URL", help="ray: http://HEAD:8265; default: RAY_ADDRESS, or the Ray here")
    submit.add_argument(
        "--site", metavar="FILE", type=Path, help="kuberay, slurm: what the cluster has (see docs/clusters.md)"
    )
    submit.add_argument("--resume", choices=("auto", "never", "must"), default="auto", help="as in `run`")
    submit.add_argument("--dry-run", action="store_true", help="print what would be sent, send nothing")

    data = commands.add_parser("data", help="pack, verify and describe WebDataset shards")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    arguments_of_data.add_to(actions)
    actions.add_parser("features", parents=[job], help="compute the features that a transfer job trains on")

    evaluate = commands.add_parser("eval", help="classify a data set with a finished run's network")
    evaluate.add_argument("run", metavar="RUN", help="a run's name in runs/, its folder, or its s3:// or gs:// URL")
    evaluate.add_argument("--data", metavar="OUT", help="shards to classify instead of the job's own val data")
    evaluate.add_argument(
        "--early-exit",
        action="store_true",
        help="also what is saved when sure samples leave early: accuracy against compute (needs model.vote fitted)",
    )
    evaluate.add_argument(
        "--probe",
        action="store_true",
        help="also linear probes of each layer's output, before and after normalisation, and its prototypes",
    )
    evaluate.add_argument("--json", metavar="FILE", type=result_file, help="also write the result as JSON")

    predict = commands.add_parser("predict", help="classify image files; shows how every layer voted")
    predict.add_argument("run", metavar="RUN", help="a run's name in runs/, its folder, or its s3:// or gs:// URL")
    predict.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="JPEG or PNG files")
    predict.add_argument("--top", metavar="N", default="5", help="how many classes to show (default 5)")
    predict.add_argument(
        "--json", metavar="FILE", type=result_file, help="also write the result as JSON (- for stdout)"
    )

    export = commands.add_parser("export", help="write a run's network as one file for other programs")
    export.add_argument("run", metavar="RUN", help="a run's name in runs/, its folder, or its s3:// or gs:// URL")
    export.add_argument(
        "--format",
        required=True,
        choices=("torch-export", "onnx", "safetensors", "timm"),
        help="images (N, H, W, C) uint8 in, scores (N, classes) out; timm: the trunk of a transfer run alone",
    )
    export.add_argument("--out", metavar="FILE", type=Path, help="default: RUN/network.pt2, .onnx, .safetensors")
    export.add_argument("--force", action="store_true", help="replace the file if it is there already")

    report = commands.add_parser("report", help="one self-contained HTML page for one run or several")
    report.add_argument("runs", metavar="RUN", nargs="+", help="names in runs/, folders, or s3:// or gs:// URLs")
    report.add_argument(
        "--out",
        metavar="FILE",
        type=result_file,
        help="default: RUN/report.html; of several, comparison.html in the first",
    )

    run_arguments.add_to(commands)

    completion = commands.add_parser("completion", help="a script that completes commands in a shell")
    completion.add_argument("shell", choices=("bash", "zsh"))
    add_examples(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        with interrupting():
            arguments = make_parser().parse_args(argv)
            command: Callable[[argparse.Namespace], int] = _COMMANDS[arguments.command]
            return command(arguments)
    except OrchestratorError as error:
        sys.stdout.flush()
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # where nothing is to be saved: a run turns it into a wish to stop
        sys.stdout.flush()
        print(INTERRUPTED, file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OTHER


def _run(arguments: argparse.Namespace) -> int:
    from orchestrator.run.records.start import process_began

    began = process_began()
    from orchestrator.launch.command import run_command

    return run_command(
        arguments.job,
        overrides=arguments.overrides,
        seeds=_numbers(arguments.seeds, "--seeds", least=0) if arguments.seeds else None,
        summary_path=arguments.summary,
        resume=arguments.resume,
        began=began,
    )


def _numbers(text: str, flag: str, *, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least or len(set(numbers)) != len(numbers):
        raise JobError(f"{flag}: must be different whole numbers >= {least}, separated by commas, got {text!r}")
    return numbers


def _check(arguments: argparse.Namespace) -> int:
    from orchestrator.show.check import check_command

    return check_command(arguments.job, arguments.overrides)


def _plan(arguments: argparse.Namespace) -> int:
    from orchestrator.launch.plan import plan_command

    return plan_command(
        arguments.job,
        arguments.overrides,
        workers=_numbers(arguments.workers, "--workers", least=1) if arguments.workers else None,
        profile=arguments.profile,
        price_per_hour=_price(arguments.price_per_hour),
        json_path=arguments.json,
    )


def _price(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise JobError(f"--price-per-hour: must be a number >= 0, got {text!r}")
    return price


def _submit(arguments: argparse.Namespace) -> int:
    if arguments.to == "ray":
        from orchestrator.launch.clusters.submit import submit_command

        if arguments.site is not None:
            raise JobError("--site: only with --to kuberay or slurm; a running Ray cluster says itself what it has")
        return submit_command(
            arguments.job,
            arguments.overrides,
            address=arguments.address,
            resume=arguments.resume,
            dry_run=arguments.dry_run,
        )
    from orchestrator.job.load import load_any, placed
    from orchestrator.job.site import load_site

    if arguments.address is not None:
        raise JobError(f"--address: only with --to ray, got --to {arguments.to}")
    site = load_site(arguments.site)
    job = load_any(arguments.job, arguments.overrides)
    how = {"resume": arguments.resume, "dry_run": arguments.dry_run}
    if arguments.to == "kuberay":
        from orchestrator.launch.clusters.kuberay import submit_to_kuberay

        with placed(arguments.job, arguments.overrides):
            return submit_to_kuberay(job, site, **how)
    from orchestrator.launch.clusters.slurm import submit_to_slurm

    with placed(arguments.job, arguments.overrides):
        return submit_to_slurm(job, site, arguments.job, arguments.overrides, **how)


def _data(arguments: argparse.Namespace) -> int:
    if arguments.action == "features":
        from orchestrator.launch.features import features_command

        return features_command(arguments.job, arguments.overrides)
    share = None
    if arguments.action == "pack" and arguments.ray:
        from orchestrator.launch import ray_pack

        share = ray_pack.results_on_ray
    code = arguments_of_data.call(arguments, share)
    if arguments.action == "stats" and arguments.html is not None:
        from orchestrator.data.stores.remote_index import open_data
        from orchestrator.show.pages.data_page import write_page

        write_page(open_data(arguments.out), arguments.html)
        print(f"Page: {arguments.html}")
    return code


def _eval(arguments: argparse.Namespace) -> int:
    run = _trained(arguments.run)
    from orchestrator.launch.command import eval_command

    return eval_command(
        run,
        arguments.data,
        arguments.json,
        with_exits=arguments.early_exit,
        with_probes=arguments.probe,
    )


def _predict(arguments: argparse.Namespace) -> int:
    top = whole_number(arguments.top, "--top")
    run = _trained(arguments.run)
    from orchestrator.show.predictions import predict_command

    _silence()
    return predict_command(run, arguments.images, top, arguments.json)


def _export(arguments: argparse.Namespace) -> int:
    run = _trained(arguments.run)
    from orchestrator.run.inference.export import export_run

    _silence()
    done = export_run(run, arguments.format, arguments.out, replace=arguments.force)
    note = (
        "" if done.difference is None else f" (scores differ from the run's network by at most {done.difference:.1g})"
    )
    print(f"Written: {done.path}{note}")
    return EXIT_DONE


def _trained(named: str) -> Path:
    """The folder of the run whose network is used; who looks on is told what the next seconds are for."""
    from orchestrator.run.folder import existing_network

    run = run_here(named)
    existing_network(run)
    if sys.stderr.isatty():
        print(f"Reading the network of {run} ...", file=sys.stderr, flush=True)
    return run


def _silence() -> None:
    """Libraries warn about their own affairs; the user of a command sees our words only."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    for library in ("torch", "onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _report(arguments: argparse.Namespace) -> int:
    from orchestrator.run.folder import existing_run
    from orchestrator.show.pages.report import write_report

    found = [run_here(run, weights=False) for run in arguments.runs]
    for run in found:
        existing_run(run)
    name = "report.html" if len(found) == 1 else "comparison.html"
    out = arguments.out or found[0] / name
    write_report(found, out)
    print(f"Written: {out}")
    return EXIT_DONE


def _completion(arguments: argparse.Namespace) -> int:
    from orchestrator.show.completion import completion_command

    return completion_command(make_parser(), arguments.shell)


_COMMANDS = {
    "run": _run,
    "check": _check,
    "plan": _plan,
    "submit": _submit,
    "data": _data,
    "eval": _eval,
    "predict": _predict,
    "export": _export,
    "report": _report,
    "runs": run_arguments.call,
    "completion": _completion,
}

if __name__ == "__main__":
    sys.exit(main())
