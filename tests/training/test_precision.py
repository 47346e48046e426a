import logging
import os

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf

from transformers_radio import precision
from transformers_radio.precision import is_fast, resolve_dtype, resolve_mixed_precision, warn_if_slow
from transformers_radio.training import load_recipe, train
from transformers_radio.training.plan.tables import print_plan
from transformers_radio.training.run.folder import find_run
from transformers_radio.training.run.processes import threads_beside_workers
from transformers_radio.training.run.signals import StopSignal

CPU = torch.device("cpu")
AUTO = ["mixed_precision=auto", "teachers.clip.dtype=auto"]


@pytest.fixture
def machine(monkeypatch):
    """Says of this CPU that it has bfloat16 units, or that it has none."""

    def pretend(bf16):
        fake = type("Operators", (), {"_is_mkldnn_bf16_supported": staticmethod(lambda: bf16)})
        fake._is_mkldnn_fp16_supported = staticmethod(lambda: False)
        monkeypatch.setattr(torch.ops, "mkldnn", fake)

    return pretend


def run_file(folder):
    return OmegaConf.load(folder / "run.yaml")


@pytest.mark.parametrize("units", [True, False])
def test_auto_follows_what_torch_reports(machine, units):
    machine(bf16=units)
    assert resolve_dtype("auto", CPU) == ("bfloat16" if units else "float32")
    assert resolve_mixed_precision("auto", CPU) == ("bf16" if units else "no")
    assert resolve_dtype("float16", CPU) == "float16" and resolve_mixed_precision("fp16", CPU) == "fp16"


def test_a_torch_without_onednn_has_no_units(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not is_fast(torch.bfloat16, CPU) and is_fast(torch.float32, CPU)


def test_gpus_are_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_units in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_units: has)
        assert is_fast(torch.bfloat16, torch.device("cuda")) is has_units


def test_the_warning_measures_and_names_the_fields(machine, monkeypatch, caplog):
    machine(bf16=False)
    monkeypatch.setattr(precision, "slowdown", lambda dtype: {torch.bfloat16: 61.8, torch.float16: 50}[dtype])
    settings = {"mixed_precision": ("bf16", "auto"), "dtype": ("float32", "auto"), "other": ("float16", "float32")}
    with caplog.at_level(logging.WARNING):
        warn_if_slow(settings, CPU)
    (message,) = caplog.messages
    assert message.startswith("mixed_precision=bf16, other=float16: ")
    assert "61.8 (bf16), 50 (float16) times as long" in message and message.endswith(
        "Set mixed_precision=auto other=float32."
    )
    caplog.clear()
    machine(bf16=True)
    warn_if_slow({"mixed_precision": ("bf16", "auto")}, CPU)
    warn_if_slow({"mixed_precision": ("bf16", "auto")}, torch.device("cuda"))
    assert not caplog.messages


def test_the_measured_ratio_is_that_of_equal_work():
    assert precision.slowdown(torch.float32) == pytest.approx(1, rel=2)  # itself: only noise apart from 1


def test_a_run_records_what_auto_meant_and_keeps_it_elsewhere(machine, make_recipe, tmp_path, caplog, monkeypatch):
    machine(bf16=False)
    short = [*AUTO, "stages.main.steps=4", "stages.main.warmup_steps=1"]
    train(load_recipe(make_recipe("plain"), short))
    assert run_file(tmp_path / "plain").mixed_precision == "no"
    assert run_file(tmp_path / "plain").teachers.clip.dtype == "float32"

    # begun here, where it means float32; resumed where it would mean bfloat16
    monkeypatch.setattr(StopSignal, "agreed", lambda self, accelerator: True)
    moved = make_recipe("moved")
    assert train(load_recipe(moved, short)).student_dir is None
    monkeypatch.undo()
    machine(bf16=True)
    with pytest.raises(FileExistsError, match=r"mixed_precision \('no' there, 'bf16' here\)"):
        find_run(load_recipe(moved, [*short, "mixed_precision=bf16"]))
    train(load_recipe(moved, short))
    assert run_file(tmp_path / "moved").mixed_precision == "no"
    for name in ("model.safetensors", "config.json"):
        same = [(tmp_path / run / "student" / name).read_bytes() for run in ("plain", "moved")]
        assert same[0] == same[1]


def test_overwriting_continues_an_unfinished_run_of_another_machine(machine, make_recipe, tmp_path, monkeypatch):
    """Its precision is the recorded one; a damaged record starts over, in what is fast here."""
    machine(bf16=False)
    short = [*AUTO, "stages.main.steps=4", "stages.main.warmup_steps=1", "overwrite=true"]
    monkeypatch.setattr(StopSignal, "agreed", lambda self, accelerator: True)
    assert train(load_recipe(make_recipe(), short)).step == 1
    machine(bf16=True)
    assert train(load_recipe(make_recipe(), short)).step == 2
    assert run_file(tmp_path / "run").mixed_precision == "no"
    (tmp_path / "run" / "run.yaml").write_text("mixed_precision: [")
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision is one of the process
    try:
        assert train(load_recipe(make_recipe(), short)).step == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert run_file(tmp_path / "run").mixed_precision == "bf16"


def test_plan_warns_of_a_slow_precision(machine, make_recipe, caplog, capsys):
    machine(bf16=False)
    print_plan(load_recipe(make_recipe(), ["mixed_precision=bf16", "teachers.clip.dtype=bfloat16"]))
    (message,) = (text for text in caplog.messages if "times as long" in text)
    assert "mixed_precision=bf16, teachers.clip.dtype=bfloat16" in message
    caplog.clear()
    print_plan(load_recipe(make_recipe(), AUTO))
    print_plan(load_recipe(make_recipe(), ["mixed_precision=bf16"]), gpu="h100")
    assert not [text for text in caplog.messages if "times as long" in text]


@pytest.mark.parametrize(
    ("cores", "ranks", "workers", "before", "threads"),
    [
        (2, 1, 1, 2, 1),
        (2, 1, 2, 2, 1),  # at least one
        (16, 1, 4, 16, 12),
        (16, 4, 2, 16, 2),  # of 4 cores for each process
        (16, 1, 2, 3, 3),  # never more than there were
    ],
)
def test_threads_are_counted_against_data_workers(monkeypatch, cores, ranks, workers, before, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    known = torch.get_num_threads()
    torch.set_num_threads(before)
    try:
        with threads_beside_workers(workers, CPU):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == before
        with threads_beside_workers(workers, torch.device("cuda")):
            assert torch.get_num_threads() == before
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with threads_beside_workers(workers, CPU):
            assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(known)
