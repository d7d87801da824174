import email.message

import pytest

from tw_jax import doctor
from tw_jax.errors import UserError

LINES = [
    "numpy>=1",
    "pyyaml>=99",
    "no-such-distribution-anywhere",
    'rich>=1; extra == "pretty"',
    'no-such-extra-package>=2; extra == "dev"',
    'numpy>=1; python_version < "3"',
]


def test_requirements_are_compared():
    found = {(r.extra, r.name): r for r in doctor.check_requirements(LINES, ["pretty", "dev"])}
    assert {key: r.verdict for key, r in found.items()} == {
        ("", "numpy"): "ok",
        ("", "pyyaml"): "wrong version",
        ("", "no-such-distribution-anywhere"): "missing",
        ("pretty", "rich"): "ok",
        ("dev", "no-such-extra-package"): "missing",
    }
    assert found["dev", "no-such-extra-package"].installed is None


def test_extras_of_requirements_are_followed():
    found = doctor.check_requirements(['jax[tpu]>=0.1; extra == "tpu"'], ["tpu"])
    assert "libtpu" in {r.name for r in found if r.extra == "tpu"}


@pytest.mark.parametrize(
    ("lines", "require", "status", "says"),
    [
        (["numpy>=1", 'no-such-thing; extra == "dev"'], (), 0, "dev is incomplete"),
        (["numpy>=1", 'no-such-thing; extra == "dev"'], ("dev",), 1, 'pip install -e ".[dev]"'),
        (["no-such-thing"], (), 1, "base is incomplete: pip install -e ."),
        (["numpy>=1"], (), 0, "CPU cores"),
    ],
)
def test_exit_status(monkeypatch, capsys, lines, require, status, says):
    metadata = email.message.Message()
    metadata["Provides-Extra"] = "dev"
    for line in lines:
        metadata["Requires-Dist"] = line
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: metadata)
    monkeypatch.setenv("COLUMNS", "160")
    assert doctor.run_doctor(doctor.DoctorConfig(require)) == status
    out = capsys.readouterr().out
    assert says in out
    assert "devices" in out
    with pytest.raises(UserError, match="no extra 'gpu', only dev"):
        doctor.run_doctor(doctor.DoctorConfig(("gpu",)))


def test_a_backend_that_cannot_start_is_a_finding(monkeypatch):
    import jax

    def broken():
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "devices", broken)
    findings = doctor.machine_findings()
    assert [f.found for f in findings if f.is_fatal] == ["JAX cannot start: no backend"]


def test_allocator_hint(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    with_pages = {f.subject: f.remedy for f in doctor.machine_findings()}
    monkeypatch.delenv("GLIBC_TUNABLES")
    without = {f.subject: f.remedy for f in doctor.machine_findings()}
    if "GLIBC_TUNABLES" not in without:
        pytest.skip("the allocator hint is for Linux")
    assert not with_pages["GLIBC_TUNABLES"]
    assert "hugetlb" in without["GLIBC_TUNABLES"]
