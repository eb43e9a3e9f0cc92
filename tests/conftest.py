"""Conftest: every run says which backend it tests, and is refused where it would test the wrong one in silence."""

from __future__ import annotations

import importlib.util
import os

import pytest

import zipslicer


def pytest_report_header() -> str:
    return f"zipslicer backend: {zipslicer.backend()}"


def pytest_configure(config: pytest.Config) -> None:
    wanted = os.environ.get("ZIPSLICER_BACKEND") or "auto"
    if os.environ.get("ZIPSLICER_REQUIRE_NATIVE") == "1" and wanted != "pure" and zipslicer.backend() != "native":
        # Python imports ./zipslicer of the checkout, where no compiled module lies, if pytest is run with -m.
        raise pytest.UsageError(
            f"ZIPSLICER_REQUIRE_NATIVE=1, and the backend is {zipslicer.backend()}: zipslicer comes from {zipslicer.__file__}"
        )
    if os.environ.get("ZIPSLICER_WITHOUT_TORCH") == "1":
        # With torch there, or without these, the tests would prove nothing and say so in skips only.
        wrong = [name for name in ("numpy", "ml_dtypes", "hypothesis") if importlib.util.find_spec(name) is None]
        wrong += ["torch"] if importlib.util.find_spec("torch") is not None else []
        if wrong:
            raise pytest.UsageError(
                f"ZIPSLICER_WITHOUT_TORCH=1 wants numpy, ml_dtypes and hypothesis, and no torch: look at {wrong}"
            )


if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    # Both without a deadline: the machine that runs the tests may be busy.
    settings.register_profile("default", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("ci", settings.get_profile("default"), derandomize=True, max_examples=300)
    settings.register_profile("long", settings.get_profile("default"), max_examples=20_000)
    settings.load_profile(os.environ.get("ZIPSLICER_HYPOTHESIS") or ("ci" if os.environ.get("CI") else "default"))
