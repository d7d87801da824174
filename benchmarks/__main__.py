"""Runs one benchmark and prints its result as one JSON object on the last line."""

import argparse
import importlib
import json
import pathlib
import sys

BENCHMARKS = (
    "trie",
    "data",
    "train",
    "sft",
    "rollout",
    "update",
    "rl",
    "objectives",
    "forkjoin",
    "parity",
    "checkpoint-io",
    "attention",
    "attention-gpu",
    "paged-attention",
    "serve",
)
AGAINST_PEERS = {"sft": ("tunix",), "rollout": ("tunix", "hf"), "rl": ("tunix",)}


def main() -> None:
    """Entry point of `python -m benchmarks`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in BENCHMARKS:
        benchmark = names.add_parser(name)
        benchmark.add_argument("--json", metavar="FILE", help="write the JSON here too")
        if name in AGAINST_PEERS:
            benchmark.add_argument("--peer", choices=AGAINST_PEERS[name], default="tunix")
    arguments = vars(parser.parse_args())
    module = f"benchmarks.{arguments.pop('name').replace('-', '_')}"
    file = arguments.pop("json")
    line = json.dumps(importlib.import_module(module).run(**arguments))
    if file and file != "-":
        pathlib.Path(file).write_text(line + "\n", encoding="utf-8")
    print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
