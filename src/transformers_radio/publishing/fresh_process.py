"""What a stranger's process makes of a student's folder: run by `loaders.py`, with the folder and two file names.

The package cannot be imported here, as on a machine where it is not installed.
"""

import sys

if __name__ == "__main__":
    sys.modules["transformers_radio"] = None  # type: ignore[assignment]
    folder, has_native_class, given, found = sys.argv[1:]

    import numpy
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from transformers import AutoImageProcessor, AutoModel

    images = load_file(given)["images"]
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    picture = Image.fromarray(numpy.arange(40 * 60 * 3, dtype=numpy.uint8).reshape(40, 60, 3))
    outputs = {"processor": processor(picture, return_tensors="pt")["pixel_values"]}
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        out = model(images)
        outputs |= {"summary": out.summary, "features": out.features}
        for name, adaptor in out.adaptors.items():
            outputs |= {f"{name}.{kind}": adaptor[kind] for kind in ("summary", "features") if kind in adaptor}
        if has_native_class == "yes":
            del model
            out = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(images)
            outputs |= {"native.summary": out.summary, "native.features": out.features}
    save_file({name: value.contiguous() for name, value in outputs.items()}, found)
