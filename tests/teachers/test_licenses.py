"""Licenses of known teachers and of their students, and what is not known."""

import pytest

from helpers.paths import ROOT
from transformers_radio.teachers.known import KNOWN
from transformers_radio.teachers.licenses import License, hub_id, license_of, objection, student_license
from transformers_radio.training import load_recipe

APACHE, MIT, NC = License("apache-2.0"), License("mit"), License("cc-by-nc-4.0")
DINOV3 = license_of("transformers", "facebook/dinov3-vitl16-pretrain-lvd1689m")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_every_known_teacher_and_every_teacher_of_a_recipe_has_a_license():
    teachers = [(type, checkpoint) for type, known in KNOWN.items() for checkpoint in known]
    for path in RECIPES:
        teachers += [(spec.type, spec.checkpoint) for spec in load_recipe(path).teachers.values()]
    assert [one for one in teachers if license_of(*one) is None] == [] and len(teachers) > 20


@pytest.mark.parametrize(
    ("type", "checkpoint", "model", "license"),
    [
        ("open_clip", "ViT-H-14-378-quickgelu:dfn5b", "apple/DFN5B-CLIP-ViT-H-14-378", "apple-amlr"),
        ("open_clip", "hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "mit"),
        ("segment_anything", "/somewhere/sam_vit_h_4b8939.pth", "facebook/sam-vit-huge", "apache-2.0"),
        ("transformers", "nvidia/RADIO-L", "nvidia/RADIO-L", "nsclv1"),
        ("transformers", "nvidia/C-RADIOv4-H", "nvidia/C-RADIOv4-H", "nvidia-open-model-license"),
        ("timm", "vit_base_patch16_dinov3.lvd1689m", "timm/vit_base_patch16_dinov3.lvd1689m", "dinov3-license"),
        ("timm", "vit_huge_patch14_clip_378.dfn5b", "timm/vit_huge_patch14_clip_378.dfn5b", "apple-amlr"),
        ("timm", "resnet50.a1_in1k", "timm/resnet50.a1_in1k", "apache-2.0"),  # timm's own record
        ("open_clip", "package:quickstart/teachers/clip", None, "apache-2.0"),
    ],
)
def test_teachers_are_recognized_in_every_form_of_their_names(type, checkpoint, model, license):
    assert hub_id(type, checkpoint) == model
    assert str(license_of(type, checkpoint)) == license


@pytest.mark.parametrize("teacher", [("python", "a:B"), ("transformers", "someone/else"), ("open_clip", "no:such")])
def test_others_are_unknown(teacher):
    assert license_of(*teacher) is None


def test_a_folder_says_its_license_itself(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: research-only\n---\n")
    assert license_of("transformers", str(tmp_path)).is_research_only
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of("transformers", str(tmp_path)) is None


@pytest.mark.parametrize(
    ("teachers", "student"),
    [
        ([APACHE, MIT], "apache-2.0"),
        ([APACHE, NC], "research-only"),
        ([NC, None], "research-only"),  # whatever the other one says, no more than this
        ([DINOV3, NC], "research-only"),
        ([APACHE, DINOV3], "dinov3-license"),
        ([DINOV3, license_of("transformers", "facebook/sam3")], None),
        ([APACHE, None], None),
    ],
)
def test_the_strictest_teacher_decides(teachers, student):
    named = {f"t{number}": license for number, license in enumerate(teachers)}
    license, reasons = student_license(named)
    assert (str(license) if license else None) == student and reasons
    assert license is None or objection(license, named) is None  # what is proposed may be published


def test_objections_name_the_teacher():
    assert "teacher is licensed for research only (cc-by-nc-4.0)" in objection(MIT, {"teacher": NC})
    assert "dinov3-license, is passed on" in objection(APACHE, {"teacher": DINOV3})
    assert objection(NC, {"teacher": NC}) is None and objection(MIT, {"teacher": None, "other": APACHE}) is None
