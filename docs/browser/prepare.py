"""Put beside index.html what it needs: the quickstart's student as int8 ONNX, and the words that it knows.

transformers-radio quickstart
python docs/browser/prepare.py runs/quickstart/run/student
npm install onnxruntime-web && cp -r node_modules/onnxruntime-web/dist docs/browser/ort
python -m http.server --directory docs/browser
"""

import argparse
import shutil
from pathlib import Path

import transformers_radio.quickstart
from transformers_radio.disk import write_json
from transformers_radio.evaluation.classification.zero_shot import zero_shot_classifier
from transformers_radio.export.run import export_student
from transformers_radio.quickstart.measure import TEMPLATES
from transformers_radio.quickstart.scenes import CLASS_NAMES
from transformers_radio.teachers import load_text_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    program, rows = export_student(
        args.student, args.output / "student", dtype="q8", adaptors=["clip"], overwrite=True
    )
    shutil.copy(program, args.output / program.name)
    clip = Path(transformers_radio.quickstart.__file__).parent / "teachers" / "clip"
    vectors = zero_shot_classifier(load_text_encoder("open_clip", str(clip)), CLASS_NAMES, TEMPLATES)
    words = {"side": rows[0].height, "names": list(CLASS_NAMES), "vectors": vectors.tolist()}
    write_json(args.output / "words.json", words)


if __name__ == "__main__":
    main()
