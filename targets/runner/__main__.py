"""Build the TensorRT engine of a bundle, with the TensorRT of this machine.

    cd <bundle> && python3 -m runner [build] [--workspace-mib 1024] [--optimization-level 3] [--dla-core 0]

Checks every file against bundle.json, writes model.engine, runs the images of sample.npz through it and compares the
logits with the logits of the torch program. The last line of stdout is one JSON object, also in result.json; all other
output goes to stderr. Exit codes: 0 done; 2 the bundle is damaged; 3 this machine cannot build or run the engine; 4
TensorRT rejected the graph, or the logits differ by more than bundle.json allows.

Needs Python 3.8, TensorRT 8.5 or later and, to run the sample, numpy and an NVIDIA GPU: JetPack includes all of them.
The host imports this package as `targets.runner`: engines are built and run by the same code everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .bundle import build_bundle
from .errors import Refused


def _to_stderr(severity: str, message: str) -> None:
    print(f"{severity.lower()}: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m runner", description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build the engine and run the sample images (the default)")
    build.add_argument(
        "--workspace-mib", type=_positive, help="GPU memory for building (half of the free memory, at most 1024)"
    )
    build.add_argument("--optimization-level", type=int, choices=range(6), help="TensorRT's; 5 builds longest")
    build.add_argument("--dla-core", type=int, choices=range(2), help="run on this DLA core, the rest on the GPU")
    build.set_defaults(run=_build)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of MiB above 0")
    return int(text)


def _build(arguments: argparse.Namespace) -> int:
    options = {
        "workspace_bytes": None if arguments.workspace_mib is None else arguments.workspace_mib << 20,
        "optimization_level": arguments.optimization_level,
        "dla_core": arguments.dla_core,
    }
    result = build_bundle(Path(__file__).resolve().parent.parent, options, _to_stderr)
    print(json.dumps(result))
    return 0


def main() -> int:
    words = sys.argv[1:]
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["build", *words]
    arguments = _parser().parse_args(words)
    try:
        return int(arguments.run(arguments))
    except Refused as e:
        print(e, file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
