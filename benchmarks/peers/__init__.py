"""Other libraries that ours is measured against, each in an environment of its own.

The environment `benchmarks/peers/NAME` is made on first use, with the pinned version below; it is
not part of the repository.
"""

import pathlib
import subprocess
import sys

PEERS = {"tunix": "google-tunix==0.1.7"}


def peer_python(name: str) -> str:
    """The Python of a peer's environment, which is installed if it is not there."""
    folder = pathlib.Path(__file__).parent / name
    python = folder / "bin" / "python"
    mark = folder / f".installed-{PEERS[name]}"
    if not mark.exists():
        print(f"installing {PEERS[name]} into {folder} (a minute or two)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", PEERS[name]], check=True)
        mark.touch()
    return str(python)
