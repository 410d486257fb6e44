from __future__ import annotations

import pytest

from course_lib import doctor


def test_a_missing_package_and_a_wrong_version_are_faults_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "peft":
            raise doctor.importlib.metadata.PackageNotFoundError
        return {"torch": "2.13.0", "transformers": "4.57.1", "accelerate": "1.15.0", "bitsandbytes": "0.50.2"}[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    checks = {check.name: check for check in doctor._packages()}
    assert checks["torch"].state == "ok"
    assert checks["transformers"].state == "fault"
    assert "5.17" in checks["transformers"].remedy
    assert checks["peft"].finding == "not installed"
    assert "pip install" in checks["peft"].remedy


def test_too_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    low = type("Memory", (), {"available": 1e9, "total": 2e9})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: low)
    assert doctor._memory()[0].state == "fault"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1e6})())
    assert "COURSE_HOME" in doctor._disk()[0].remedy


def test_a_check_that_breaks_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[doctor.Check]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "_gpu", broken)
    faults = [check for check in doctor.examine() if check.state == "fault"]
    assert any("no such thing" in check.finding for check in faults)


def test_what_holds_a_models_code_is_named_and_its_lack_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from course_lib.agent import isolation

    (here,) = doctor._agent()
    assert here.state in ("ok", "absent")
    assert all(layer in here.finding for layer in isolation.isolation_in_force())
    monkeypatch.setattr(isolation, "isolation_in_force", lambda: ("Python's audit hook",))
    (check,) = doctor._agent()
    assert check.state == "absent"
    assert "held by Python's audit hook" in check.finding
    assert "the other tools work" in check.remedy
