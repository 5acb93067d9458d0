import warnings

import pytest
import torch

from minijamba import rungs
from minijamba.rungs import choose, use_rung
from minijamba.testing import assert_rejects

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LADDER = {"naive": "the definition", "parallel": "the algorithm"}
WITH_KERNEL = {**LADDER, "fused": "the hardware"}


def test_auto_takes_the_last_rung_and_a_name_takes_that_one():
    def check(choose):
        assert choose("scan", "auto", LADDER, CPU) == "the algorithm"
        assert choose("scan", "auto", WITH_KERNEL, GPU) == "the hardware"
        assert choose("scan", "auto", WITH_KERNEL, CPU) == "the algorithm", "interpreting a kernel is slow"
        assert choose("scan", "naive", WITH_KERNEL, CPU) == "the definition"

    def always_the_fastest(component, rung, implementations, device):
        return list(implementations.values())[-1]

    check(choose)
    assert_rejects(check, always_the_fastest)


def test_use_rung_holds_inside_its_block_only():
    def chosen(rung="auto"):
        return choose("scan", rung, WITH_KERNEL, GPU)

    with use_rung("naive"):
        assert chosen() == "the definition"
        assert chosen("parallel") == "the algorithm", "a rung named in the call goes before the block's"
        with use_rung("parallel"):
            assert chosen() == "the algorithm"
        assert chosen() == "the definition"
    assert chosen() == "the hardware"
    with pytest.raises(KeyError), use_rung("naive"):
        raise KeyError
    assert chosen() == "the hardware", "an exception leaves the block too"


def test_unknown_rung_names_the_choices():
    wanted = r"scan has no rung 'fast' here; choose 'auto' or one of \['naive', 'parallel'\]"
    with pytest.raises(ValueError, match=wanted):
        choose("scan", "fast", LADDER, CPU)
    with use_rung("fast"), pytest.raises(ValueError, match=wanted):
        choose("scan", "auto", LADDER, CPU)


def test_a_missing_kernel_is_said_once_a_component(monkeypatch):
    monkeypatch.setattr(rungs, "_told", set())
    monkeypatch.setattr(rungs, "why_no_kernels", lambda device: None)
    with pytest.warns(UserWarning, match="scan: the parallel rung runs instead of a fused kernel; it has none yet"):
        choose("scan", "auto", LADDER, GPU)
    with pytest.warns(UserWarning, match="conv"):
        choose("conv", "auto", LADDER, GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("scan", "auto", LADDER, GPU)
        choose("moe", "auto", LADDER, CPU)
        choose("moe", "auto", WITH_KERNEL, GPU)
        choose("moe", "parallel", LADDER, GPU)


def test_a_fused_rung_that_cannot_run_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(rungs, "_TRITON", True)
    with pytest.raises(ValueError, match="tensors on a GPU and these are on cpu: .* TRITON_INTERPRET=1 .*'parallel'"):
        choose("scan", "fused", LADDER, CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert rungs.why_no_kernels(CPU) is None
    monkeypatch.setattr(rungs, "_TRITON", False)
    with pytest.raises(ValueError, match="pip install triton"):
        choose("scan", "fused", LADDER, GPU)


def test_a_block_of_kernels_takes_the_fastest_where_there_is_none(monkeypatch):
    monkeypatch.setattr(rungs, "_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_rung("fused"):
        assert choose("scan", "auto", WITH_KERNEL, CPU) == "the hardware"
        assert choose("moe", "auto", LADDER, CPU) == "the algorithm"
        with pytest.raises(ValueError, match="moe has no rung 'fused'"):
            choose("moe", "fused", LADDER, CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    with use_rung("fused"), pytest.raises(ValueError, match="tensors on a GPU"):
        choose("moe", "auto", LADDER, CPU)
