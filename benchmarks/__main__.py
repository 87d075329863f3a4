"""``python -m benchmarks run | host | call | table | plot | portable | list``: see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import shapes
from benchmarks.measuring import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PORTABLE = RESULTS / "portable"
PLOTS = ROOT / "benchmarks" / "plots"
PORTABLE_NOTES = ROOT / "flash_mla" / "backends" / "triton" / "design.md"
PEERS = ("flashmla", "fa3")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="measure shapes; append to results/<gpu>.jsonl")
    run.add_argument("--group", action="append", default=[], help=", ".join(shapes.GROUPS))
    run.add_argument("--shape", action="append", default=[], help="a shape's name, or a pattern such as 'dense_h16_*'")
    run.add_argument("--rounds", type=int, default=6, help="times that each contender is measured per shape, by turns")
    run.add_argument("--seconds", type=float, default=0.04, help="measured time per contender, shape and round")
    run.add_argument("--warmup", type=float, default=0.02, help="seconds of replays before the measured ones")
    run.add_argument("--timeout", type=float, default=120.0, help="seconds to prepare one shape")
    run.add_argument("--host", action="store_true", help="also the CPU time of an eager call")

    host = commands.add_parser("host", help="CPU time of one eager call")
    for command in (run, host):
        command.add_argument("--peers", default="", help=f"comma list of {', '.join(PEERS)}")
        command.add_argument(
            "--peer-path", action="append", default=[], metavar="NAME=DIR", help="where a peer's wheel is unpacked"
        )
        command.add_argument(
            "--baseline",
            action="append",
            default=[],
            metavar="[LABEL=]LIBRARY",
            help="another build of our library, measured like a peer",
        )
        command.add_argument(
            "--backend",
            action="append",
            default=[],
            help="also this backend of ours, such as triton",
        )
        command.add_argument("--calls", type=int, default=2000, help="eager calls for the CPU time")
        command.add_argument("--device", default="cuda")
    for command in (run, host, *(commands.add_parser(name) for name in ("table", "plot"))):
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (read and written)")
    commands.choices["plot"].add_argument("--plots", type=Path, default=PLOTS)
    commands.choices["plot"].add_argument("--readme", type=Path, default=ROOT / "README.md")
    commands.choices["table"].add_argument("--gpu", help="only this one, such as h100")
    portable = commands.add_parser(
        "portable", help="the portable backend: what was measured, and a model of other cards"
    )
    portable.add_argument("--out", type=Path, default=PORTABLE, help="folder of the results")
    portable.add_argument("--notes", type=Path, default=PORTABLE_NOTES, help="file whose marked section is written")
    commands.add_parser("list", help="groups and shapes")

    call = commands.add_parser("call", help="a few checked eager calls in this process, for profilers and sanitizers")
    call.add_argument("shape")
    call.add_argument("--count", type=int, default=3)
    call.add_argument("--device", default="cuda")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "list":
        return _list()
    if options.command == "call":
        return _call(options)
    if options.command in ("run", "host"):
        return _run(options)
    from benchmarks import report

    if options.command == "table":
        print(report.tables(report.latest(options.out), gpu=options.gpu))
        return 0
    if options.command == "portable":
        print(report.portable(options.out, options.notes))
        return 0
    return report.plot(options.out, options.plots, options.readme)


def _list() -> int:
    for group, members in shapes.GROUPS.items():
        print(f"{group}: {', '.join(shape.name for shape in members)}")
    return 0


def _call(options: argparse.Namespace) -> int:
    from benchmarks.worker import Worker

    worker = Worker("ours", options.device)
    for shape in _select([], [options.shape]):
        print(shape.name, worker.call(shape.to_json(), options.count))
    return 0


def _select(groups: list[str], names: list[str]) -> list[shapes.AnyShape]:
    try:
        return shapes.select(groups, names)
    except KeyError as error:
        sys.exit(str(error.args[0]))


def _run(options: argparse.Namespace) -> int:
    from benchmarks import report, runner

    contenders = _contenders(options)
    chosen: list[shapes.AnyShape] = []
    settings = runner.Options(device=options.device)
    if options.command == "run":
        chosen = _select(options.group or ([] if options.shape else ["goals"]), options.shape)
        settings.rounds, settings.seconds, settings.warmup_s = options.rounds, options.seconds, options.warmup
        settings.prepare_timeout_s = options.timeout
    settings.logs = options.out / "logs"
    with_host = options.command == "host" or options.host
    try:
        path, records = runner.run(chosen, contenders, settings, options.out, options.calls if with_host else 0)
    except RuntimeError as error:
        sys.exit(f"benchmarks: {error}")
    print(report.table(records))
    print(f"\nwritten to {path}; ceilings {json.dumps(records[0]['ceilings'])}" if records else "nothing to do")
    return 1 if any(record["error"] for record in records) else 0


def _contenders(options: argparse.Namespace) -> list:
    from benchmarks.runner import Contender

    paths = dict(_pair(value, "--peer-path") for value in options.peer_path)
    names = [name for name in options.peers.split(",") if name]
    names += [name for name in paths if name not in names]
    for name in names:
        if name not in PEERS:
            sys.exit(f"no peer {name!r}; peers: {', '.join(PEERS)}")
    contenders = [Contender("ours", "ours")]
    contenders += [Contender(name, name, path=paths.get(name)) for name in names]
    for value in options.baseline:
        label, library = _pair(value, "--baseline") if "=" in value else ("baseline", value)
        if not Path(library).is_file():
            sys.exit(f"--baseline: no file {library}")
        environment = {"FLASH_MLA_LIBRARY": str(Path(library).resolve())}
        contenders.append(Contender(label, "ours", environment=environment))
    contenders += [Contender(name, "ours", environment={"FLASH_MLA_BACKEND": name}) for name in options.backend]
    return contenders


def _pair(value: str, option: str) -> tuple[str, str]:
    name, separator, path = value.partition("=")
    if not separator:
        sys.exit(f"{option}: wanted NAME=PATH, got {value!r}")
    return name, path


if __name__ == "__main__":
    sys.exit(main())
