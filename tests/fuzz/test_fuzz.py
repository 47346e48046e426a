"""A part of `make fuzz`, the same cases each time; and that the fuzzer itself sees what it looks for."""

import pytest
from isolation import OUTSIDE, Worker
from run import CATEGORIES, describe, run_cases

# about ten seconds each, with the start of the process
CASES = {
    **{"images": 1500, "tars": 1000, "parquet": 800, "folders": 150, "recipes": 80},
    **{"runs": 16, "checkpoints": 150, "processors": 1500, "calls": 4000},
}
SECONDS = 60.0  # of a case: other tests may share the cores


@pytest.mark.parametrize("category", CATEGORIES)
def test_damaged_input_is_counted_or_refused_or_does_not_matter(category):
    results = run_cases(category, range(CASES[category]), seconds=SECONDS)
    outside = [describe(category, result) for result in results if result.outcome in OUTSIDE]
    assert not outside, (
        f"{len(outside)} of {CASES[category]} cases, run again by tests/fuzz/run.py --only:\n" + "\n".join(outside)
    )


def test_every_kind_of_wrong_function_is_seen(tmp_path):
    from wrong_functions import FUNCTIONS

    worker = Worker("wrong_functions", seed=0, folder=tmp_path, seconds=12)
    try:
        results = [worker.run(number) for number, _ in enumerate(FUNCTIONS)]
    finally:
        worker.close()
    # the names of the functions begin with the outcome
    assert [(result.what, result.outcome) for result in results] == [(kind, kind.split(",")[0]) for kind in FUNCTIONS]
    crash, hang = (next(result.message for result in results if result.outcome == kind) for kind in ("crash", "hang"))
    assert "SIGSEGV" in crash and "wrong_functions.py" in crash and "wrong_functions.py" in hang
