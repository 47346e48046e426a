"""Writes what this version saves, for later versions to load: `PYTHONPATH=tests python tests/saved/write.py`.

Run once for each release: the folder of a release is never written again. Code is left out, as what is tested is that
later code reads these files.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import transformers_radio
from helpers.small_students import small_student
from transformers_radio import RadioImageProcessor
from transformers_radio.modeling import STUDENTS

HERE = Path(__file__).parent


def outputs(model, images):
    """Everything that a student returns for these images, by name."""
    with torch.no_grad():
        out = model(images)
    found = {"summary": out.summary, "features": out.features}
    for name, adaptor in out.adaptors.items():
        found |= {f"{name}.{kind}": adaptor[kind] for kind in ("summary", "features") if kind in adaptor}
    return {name: value.contiguous() for name, value in found.items()}


def main() -> None:
    folder = HERE / transformers_radio.__version__
    if folder.exists():
        raise SystemExit(f"{folder} is there already: later versions are tested with it as it is")
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for model_type in STUDENTS:
        model = small_student(model_type)
        model.half().save_pretrained(folder / model_type)  # half the bytes
        RadioImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / model_type)
        for code in (folder / model_type).glob("*.py"):
            code.unlink()
        save_file({"images": images, **outputs(model.float(), images / 255)}, folder / f"{model_type}.safetensors")


if __name__ == "__main__":
    main()
