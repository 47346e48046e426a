"""One part of `benchmarks/gpu.py` in a process of its own, which tells the runner about its cases line by line.

`child.py MODULE --first 3 --until TIME --descriptor 5 [--dry]` writes to that descriptor, as JSON,
{"cases": [[name, limit], ...]} once, {"begin": number} before and {"end": number, "rows": [...]} after each case.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

import torch
from measure import Case, NotThereError, Setup, free

LEAST_SECONDS = 3  # a case does not begin with less left


def run_case(case: Case) -> list[dict[str, Any]]:
    """The rows of a case, whatever happens in it. `took`: seconds, of all of it."""
    started = time.perf_counter()
    try:
        measured = case.run()
        rows = measured if isinstance(measured, list) else [measured]
        took = round(time.perf_counter() - started, 1)
        return [{"name": case.name, "status": "ok", "took": took, **row} for row in rows]
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return [{"name": case.name, "status": _status(error), "reason": reason[:200]}]


def _status(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit"
    if isinstance(error, ImportError):
        own = (error.name or "").startswith("transformers_radio")
        missing = isinstance(error, ModuleNotFoundError) or "install" in str(error)
        return "not installed" if missing and not own else "error"
    return "not there" if isinstance(error, NotThereError) else "error"


def is_healthy(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access it does not, in this process."""
    try:
        return torch.zeros(1, device=device).item() == 0
    except RuntimeError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    with os.fdopen(options.descriptor, "w") as pipe:

        def tell(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=pipe, flush=True)

        if not options.dry and not torch.cuda.is_available():
            raise SystemExit("torch finds no CUDA device here; --dry runs on the CPU")
        setup = Setup(torch.device("cpu" if options.dry else "cuda"), options.dry, options.until)
        torch.manual_seed(0)
        cases = importlib.import_module(options.module).cases(setup)
        patience = 4 if options.dry else 1  # for a machine that others use too
        tell({"cases": [[case.name, patience * case.limit] for case in cases]})
        for number, case in list(enumerate(cases))[options.first :]:
            if time.time() > options.until - LEAST_SECONDS:
                break
            tell({"begin": number})
            tell({"end": number, "rows": run_case(case)})
            free(setup.device)
            if not is_healthy(setup.device):
                return 1  # the runner goes on with the next case in a new process
    return 0


if __name__ == "__main__":
    sys.exit(main())
