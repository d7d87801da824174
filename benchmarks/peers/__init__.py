"""Other libraries that ours is measured against.

Most run in an environment of their own, `benchmarks/peers/NAME`, which is made on first use with
the pinned version below and is not part of the repository. Torch runs in ours where it is there,
as in the tests: its default build brings gigabytes of CUDA, so nothing installs it unasked.
"""

import importlib.util
import pathlib
import subprocess
import sys

from tw_jax.errors import UserError

PEERS = {"tunix": "google-tunix==0.1.7", "hf": "torch==2.13.0"}
_IN_OUR_ENVIRONMENT = {"hf": "torch"}


def peer_python(name: str) -> str:
    """The Python that runs a peer; its environment is installed if it is not there.

    Raises:
      UserError: the peer runs in our environment, which lacks it.
    """
    if name in _IN_OUR_ENVIRONMENT:
        if importlib.util.find_spec(_IN_OUR_ENVIRONMENT[name]) is None:
            raise UserError(f"peer {name!r} needs {PEERS[name]}, a CPU build: pip install it first")
        return sys.executable
    folder = pathlib.Path(__file__).parent / name
    python = folder / "bin" / "python"
    mark = folder / f".installed-{PEERS[name]}"
    if not mark.exists():
        print(f"installing {PEERS[name]} into {folder} (a minute or two)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", PEERS[name]], check=True)
        mark.touch()
    return str(python)
