"""`accelerate launch -m transformers_radio.training RECIPE [key=value ...]`: the run of `transformers-radio train`.

With --trust-code, the recipe's teachers may run code (the type python, or the option trust_remote_code).
"""

import os
import sys

from transformers_radio.data import USER_ERRORS, one_line

TRUST_CODE = "--trust-code"


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 when finished, 128 + number when a signal stopped it. A user's errors are one line."""
    # torch reads it when it is loaded. Otherwise its threads occupy their cores after every small product, even while
    # other processes need them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    trust_code = TRUST_CODE in arguments
    arguments = [argument for argument in arguments if argument != TRUST_CODE]
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(f"usage: python -m transformers_radio.training RECIPE [key=value ...] [{TRUST_CODE}]")
    try:
        from .recipe import load_recipe

        recipe = load_recipe(arguments[0], arguments[1:], trust_code)  # its mistakes are named before torch is loaded
        import torch

        from .train import train

        result = train(recipe)
    except USER_ERRORS as error:
        raise SystemExit(f"error: {one_line(error)}") from error
    except KeyboardInterrupt:  # before the first step, or a second time: otherwise the step ends and is saved
        print("stopped at once; the same command starts or resumes the run", file=sys.stderr)
        return 130
    if torch.distributed.is_initialized():  # or its threads may outlive the interpreter, which then aborts
        torch.distributed.destroy_process_group()
    return 128 + result.signal if result.signal else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
