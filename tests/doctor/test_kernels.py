"""Kernels that return something else are found."""

import jax.numpy as jnp
import pytest

from llava_jax.doctor import kernels
from llava_jax.doctor.report import FAIL, OK
from llava_jax.models.attention import BACKENDS
from llava_jax.models.attention_check import Case
from tests.doctor import plants

BROKEN = {
    "zeros": lambda out: out * 0, "not a number": lambda out: out * jnp.nan, "rounded": lambda out: out * 1.02,
}  # fmt: skip


@pytest.fixture
def fake_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "CASES", (Case(tokens=64, width=16), Case("float32", tokens=64, width=16)))
    monkeypatch.setattr(kernels, "CPU_SECS", 600.0)
    return plants.look(tmp_path)


def test_good_kernels_have_one_line_with_their_worst_case(fake_machine):
    [line] = kernels.check(fake_machine)
    assert line.verdict == OK and line.figure.startswith("2 of 2 cases") and line.check == "attention: xla"
    assert len(line.detail.splitlines()) == 2


@pytest.mark.parametrize("kind", BROKEN)
def test_a_kernel_that_returns_garbage_is_found(fake_machine, monkeypatch, kind):
    run = BACKENDS["xla"].run
    broken = BACKENDS["xla"]._replace(run=lambda *args: BROKEN[kind](run(*args)))
    monkeypatch.setitem(BACKENDS, "xla", broken)
    [line] = kernels.check(fake_machine)
    assert line.verdict == FAIL and "64 tokens" in line.figure and line.remedy


def test_time_that_is_over_leaves_cases_out_and_says_so(fake_machine, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_SECS", 0.0)
    [line] = kernels.check(fake_machine)
    assert line.figure.startswith("1 of 2 cases")
