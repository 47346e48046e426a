"""`accelerate launch -m transformers_radio.training RECIPE [key=value ...]`: the run of `transformers-radio train`."""

import sys

import torch

from transformers_radio.data import SourceError

from .recipe import load_recipe
from .train import train


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 when finished, 128 + number when a signal stopped it. Errors of a user are one line."""
    if not arguments:
        raise SystemExit("usage: python -m transformers_radio.training RECIPE [key=value ...]")
    try:
        result = train(load_recipe(arguments[0], arguments[1:]))
    except (ValueError, OSError, ImportError, FloatingPointError, SourceError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:  # before the first step, or a second time: else the step ends and is saved
        print("stopped at once; the same command begins, or goes on from the last checkpoint", file=sys.stderr)
        return 130
    if torch.distributed.is_initialized():  # or its threads may outlive the interpreter, which then aborts
        torch.distributed.destroy_process_group()
    return 128 + result.signal if result.signal else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
