"""`accelerate launch -m transformers_radio.training RECIPE [key=value ...]`: the run of `transformers-radio train`."""

import os
import sys

from transformers_radio.data import USER_ERRORS, one_line


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 when finished, 128 + number when a signal stopped it. Errors of a user are one line."""
    # Read when torch is loaded. Else its threads spin for a core after every small product, also while others use it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not arguments:
        raise SystemExit("usage: python -m transformers_radio.training RECIPE [key=value ...]")
    try:
        from .recipe import load_recipe

        recipe = load_recipe(arguments[0], arguments[1:])  # its mistakes are named before torch is loaded
        import torch

        from .train import train

        result = train(recipe)
    except USER_ERRORS as error:
        raise SystemExit(f"error: {one_line(error)}") from error
    except KeyboardInterrupt:  # before the first step, or a second time: else the step ends and is saved
        print("stopped at once; the same command begins, or goes on from the last checkpoint", file=sys.stderr)
        return 130
    if torch.distributed.is_initialized():  # or its threads may outlive the interpreter, which then aborts
        torch.distributed.destroy_process_group()
    return 128 + result.signal if result.signal else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
