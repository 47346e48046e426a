"""One process of matrix.py. Prints JSON.

save FOLDER             saves a student of every type
open FOLDER ...         opens those of several folders as strangers do, without this package
open-release FOLDER ... opens those of earlier releases, with this package
"""

import json
import sys
from pathlib import Path


def save(folder: Path) -> dict[str, str]:
    """A student of every type with its code and processor in FOLDER/TYPE, images and outputs beside it."""
    import torch
    import transformers
    from safetensors.torch import save_file

    from helpers.small_students import small_student
    from saved.write import outputs
    from transformers_radio import RadioImageProcessor
    from transformers_radio.modeling import STUDENTS

    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for model_type in STUDENTS:
        model = small_student(model_type)
        model.save_pretrained(folder / model_type)
        RadioImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / model_type)
        save_file({"images": images, **outputs(model, images / 255)}, folder / f"{model_type}.safetensors")
    return {"transformers": transformers.__version__}


def difference(folder: Path, with_package: bool) -> float:
    """The largest difference of any output to that of the writer, relative to the largest value of that output."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoModel

    expected = load_file(folder.with_suffix(".safetensors"))
    images = expected.pop("images")
    if with_package:
        import transformers_radio
        from transformers_radio.modeling import student_class

        model = student_class(json.loads((folder / "config.json").read_text())["model_type"]).from_pretrained(
            folder, dtype=torch.float32
        )
        processor = transformers_radio.RadioImageProcessor.from_pretrained(folder)
    else:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
    pixels = processor(Image.fromarray(images[0].permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model.eval()(pixels)
    found = {"summary": out.summary, "features": out.features}
    for name, adaptor in out.adaptors.items():
        found |= {f"{name}.{kind}": adaptor[kind] for kind in ("summary", "features") if kind in adaptor}
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    return max(float((found[name] - want).abs().max() / want.abs().max()) for name, want in expected.items())


def main(job: str, folders: list[str]) -> dict[str, float | str]:
    if job == "save":
        return dict(save(Path(folders[0])))
    found: dict[str, float | str] = {}
    for folder in map(Path, folders):
        for student in sorted(path for path in folder.iterdir() if (path / "config.json").is_file()):
            try:
                found[f"{folder.name}/{student.name}"] = difference(student, with_package=job == "open-release")
            except Exception as error:
                found[f"{folder.name}/{student.name}"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
