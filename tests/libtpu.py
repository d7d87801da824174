"""Tests that compile for TPUs, where the compiler for them is installed."""

import os

import pytest

from tw_jax.errors import UserError
from tw_jax.planning.tpu_environment import libtpu_version

try:
    LIBTPU = libtpu_version(os.environ)  # "" where it is missing
    _WHY = ""
except UserError as error:
    LIBTPU, _WHY = "", str(error)
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason=_WHY)
