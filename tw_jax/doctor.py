"""`tw-jax doctor`: what this machine has, what is missing, and the command that mends it."""

import collections
import dataclasses
import glob
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

import packaging.requirements
import rich.console
import rich.table

import tw_jax
from tw_jax.errors import UserError

DISTRIBUTION = "tw-jax"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
Verdict = Literal["ok", "missing", "wrong version"]


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Settings of `tw-jax doctor`.

    Attributes:
      require: extras (such as cuda or dev) that must be complete too for exit status 0.
    """

    require: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One package that tw_jax or one of its extras asks for.

    Attributes:
      extra: the extra that asks for it; "" for the base installation.
      name: name of the distribution.
      wanted: the admitted versions, as a specifier such as ">=1.2,<2".
      installed: the installed version; None if it is missing.
      verdict: whether the installed version will do.
    """

    extra: str
    name: str
    wanted: str
    installed: str | None
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fact about the machine.

    Attributes:
      subject: what it is about.
      found: what was found.
      remedy: what to do about it; "" if all is well.
      is_fatal: nothing will run before this is mended.
    """

    subject: str
    found: str
    remedy: str = ""
    is_fatal: bool = False


def installed_version(name: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_requirements(lines: Iterable[str], extras: Sequence[str]) -> list[Requirement]:
    """Compares requirement lines, as package metadata holds them, with what is installed."""
    found = []
    for extra in ("", *extras):
        for line in lines:
            wish = packaging.requirements.Requirement(line)
            in_base = wish.marker is None or wish.marker.evaluate({"extra": ""})
            in_extra = wish.marker is not None and wish.marker.evaluate({"extra": extra})
            if not (in_base if extra == "" else in_extra and not in_base):
                continue
            version = installed_version(wish.name)
            verdict: Verdict = "ok"
            if version is None:
                verdict = "missing"
            elif not wish.specifier.contains(version, prereleases=True):
                verdict = "wrong version"
            found.append(Requirement(extra, wish.name, str(wish.specifier), version, verdict))
            # `jax[cuda12]` is there only if what its extra pulls in is there too.
            if verdict == "ok" and wish.extras:
                inner = importlib.metadata.requires(wish.name) or []
                pulled = [r for r in check_requirements(inner, sorted(wish.extras)) if r.extra]
                found += [dataclasses.replace(r, extra=extra) for r in pulled if r.name != "jaxlib"]
    return found


def machine_findings() -> list[Finding]:
    """What Python, the memory, the allocator and the devices look like."""
    version = platform.python_version()
    is_old = sys.version_info < (3, 11)
    findings = [
        Finding("tw_jax", f"{tw_jax.__version__} in {os.path.dirname(tw_jax.__file__)}"),
        Finding("Python", version, "use Python 3.11 or newer" if is_old else "", is_old),
        Finding("system", f"{platform.platform()}, {os.cpu_count()} CPU cores"),
        Finding("memory", _memory()),
    ]
    if platform.system() == "Linux":
        tunables = os.environ.get("GLIBC_TUNABLES", "")
        remedy = (
            "" if HUGE_PAGES in tunables else f"export GLIBC_TUNABLES={HUGE_PAGES} speeds up CPU"
        )
        findings.append(Finding("GLIBC_TUNABLES", tunables or "not set", remedy))
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    remedy = "" if cache else "set it to a folder to compile each program once only"
    findings.append(Finding("JAX_COMPILATION_CACHE_DIR", cache or "not set", remedy))
    return findings + _device_findings()


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{total / 2**30:.1f} GiB"


def _device_findings() -> list[Finding]:
    try:
        import jax

        devices = jax.devices()
    except (ImportError, RuntimeError) as error:
        return [Finding("devices", f"JAX cannot start: {error}", "see the table below", True)]
    kinds = collections.Counter(device.device_kind for device in devices)
    # The CPU backend answers None; so do some plug-ins.
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    room = f", {limit / 2**30:.1f} GiB each" if limit else ""
    findings = [Finding("devices", f"{n} x {kind}{room}") for kind, n in kinds.items()]
    if devices[0].platform == "cpu":
        for pattern, extra in (("/dev/nvidia[0-9]*", "cuda"), ("/dev/accel[0-9]*", "tpu")):
            if glob.glob(pattern):
                remedy = f'pip install -e ".[{extra}]"'
                findings.append(Finding("accelerator", "present, but JAX sees CPU only", remedy))
    return findings


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")  # never cut a path or a command
    return table


def run_doctor(config: DoctorConfig) -> int:
    """Prints the tables; returns 0 if the base and the required extras are complete, else 1."""
    console = rich.console.Console()
    findings = machine_findings()
    machine = _table("This machine", "subject", "found", "remedy")
    for finding in findings:
        machine.add_row(finding.subject, finding.found, finding.remedy)
    console.print(machine)
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "this source tree is not installed; run `pip install -e .` in it"
        ) from error
    extras = metadata.get_all("Provides-Extra") or []
    for name in config.require:
        if name not in extras:
            raise UserError(f"require: there is no extra {name!r}, only {', '.join(extras)}")
    requirements = check_requirements(metadata.get_all("Requires-Dist") or [], extras)
    packages = _table("Packages", "extra", "package", "wanted", "installed", "")
    for item in requirements:
        mark = "" if item.verdict == "ok" else item.verdict
        packages.add_row(item.extra or "base", item.name, item.wanted, item.installed or "-", mark)
    console.print(packages)
    broken = sorted({item.extra for item in requirements if item.verdict != "ok"})
    for extra in broken:
        target = f'".[{extra}]"' if extra else "."
        console.print(f"{extra or 'base'} is incomplete: pip install -e {target}", markup=False)
    fatal = any(finding.is_fatal for finding in findings)
    return int(fatal or bool({"", *config.require} & set(broken)))
