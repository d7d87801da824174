"""Runs one benchmark and prints its result as one JSON object on the last line."""

import argparse
import importlib
import json
import pathlib
import sys

BENCHMARKS = ("trie", "train", "parity", "checkpoint-io")


def main() -> None:
    """Entry point of `python -m benchmarks`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", metavar="FILE", help="write the JSON here too; '-' for stdout")
    arguments = parser.parse_args()
    module = f"benchmarks.{arguments.name.replace('-', '_')}"
    result = importlib.import_module(module).run()
    line = json.dumps(result)
    if arguments.json and arguments.json != "-":
        pathlib.Path(arguments.json).write_text(line + "\n", encoding="utf-8")
    print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
