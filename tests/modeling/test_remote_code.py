"""What the code in a saved folder imports, and how large it is: strangers read it before they run it.

A new name below is one more that a later version of transformers may move or remove.
"""

import ast
import sys

import pytest

from helpers.small_students import small_student
from transformers_radio import RadioImageProcessor
from transformers_radio.modeling import STUDENTS

LARGEST = {"radio": 208_000, "eradio": 247_000, "radio_timm": 142_000}  # bytes of all .py files together
PIN = {
    *("PIL.Image", "PIL.ImageFile", "huggingface_hub.errors.StrictDataclassError", "numpy"),
    *("safetensors.SafetensorError", "safetensors.safe_open", "safetensors.torch.load_file"),
    *("torch", "torch.distributed", "torch.nn", "torch.nn.functional"),
    "torchvision.transforms.v2.InterpolationMode",
    *("transformers.AutoBackbone", "transformers.AutoConfig", "transformers.PreTrainedConfig"),
    *("transformers.PreTrainedModel", "transformers.RadioConfig", "transformers.activations.ACT2FN"),
    *("transformers.backbone_utils.BackboneConfigMixin", "transformers.backbone_utils.BackboneMixin"),
    "transformers.image_processing_backends.TorchvisionBackend",
    "transformers.image_processing_utils.BatchFeature",
    *("transformers.image_utils", "transformers.image_utils.ImageType"),
    *("transformers.image_utils.PILImageResampling", "transformers.image_utils.get_image_type"),
    "transformers.initialization",
    "transformers.modeling_layers.GradientCheckpointingLayer",
    *("transformers.modeling_outputs.BackboneOutput", "transformers.modeling_outputs.ImageClassifierOutput"),
    "transformers.modeling_outputs.SemanticSegmenterOutput",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS",
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "transformers.models.auto.modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "transformers.processing_utils.ImagesKwargs",
    *("transformers.utils.ModelOutput", "transformers.utils.can_return_tuple", "transformers.utils.logging"),
}
STANDARD_LIBRARY = {
    *("base64", "collections", "contextlib", "contextvars", "copy", "dataclasses", "difflib", "functools"),
    *("io", "json", "math"),
    *("operator", "os", "pathlib", "pickle", "re", "stat", "struct", "typing", "zlib"),
}
BUILTINS_THAT_RUN_CODE = {"eval", "exec", "compile", "__import__"}
# of these modules the code needs errors, names of files, and the reader of its own settings
ALLOWED_CALLS = {"pickle": set(), "os": {"fspath", "stat"}}


@pytest.fixture(scope="module", params=list(STUDENTS))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / request.param
    small_student(request.param).save_pretrained(path)
    RadioImageProcessor().save_pretrained(path)
    return path


def test_imports_are_those_of_the_pin(folder):
    names, own = set(), set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                own.add(f"{node.module}.py")
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert own <= {path.name for path in folder.glob("*.py")}
    of_python = {name for name in names if name.split(".")[0] in sys.stdlib_module_names}
    assert {name.split(".")[0] for name in of_python} <= STANDARD_LIBRARY
    assert names - of_python <= (PIN | {"timm", "fastervit"} if folder.name == "radio_timm" else PIN)
    if folder.name == "radio":
        of_others = {"safetensors.torch.load_file"}
        assert names - of_python == PIN - of_others, "no longer imported: take it out of the pin"


def test_the_code_stays_small_enough_to_be_read(folder):
    files = list(folder.glob("*.py"))
    assert 0 < sum(path.stat().st_size for path in files) < LARGEST[folder.name]


def test_nothing_in_it_runs_code(folder):
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in BUILTINS_THAT_RUN_CODE, (path.name, node.lineno)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", None)
                assert node.func.attr in ALLOWED_CALLS.get(owner, {node.func.attr}), (path.name, node.lineno)
