"""What training leaves beside a student for its readers, and what it keeps to itself."""

import json
import os
from dataclasses import replace

import yaml
from huggingface_hub import ModelCard

from transformers_radio.data import SourceConfig
from transformers_radio.training import load_recipe, train
from transformers_radio.training.run.card import describe_data, portable_recipe


def test_a_student_has_a_card_its_recipe_and_its_teachers(make_recipe, tmp_path, image_folder):
    recipe = load_recipe(make_recipe(), ["stages.main.steps=3"])
    student = train(recipe).student_dir
    card = ModelCard.load(student / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.license is None and card.data.datasets is None  # nobody has said
    for text in ("| main | – | clip, sam | 32 | 4 | 3 |", "| `sam` | – | 20 |", "32 pixels", "not known"):
        assert text in card.text
    written = load_recipe(student / "recipe.yaml")
    assert written.stages == recipe.stages and written.teachers == recipe.teachers
    assert written.output_dir == "run" and written.data.path == f"local:{image_folder.name}"
    manifest = json.loads((student / "teacher_manifest.json").read_text())
    trained = json.loads((tmp_path / "run/checkpoints/step-00000003/training_state/teacher_manifest.json").read_text())
    assert manifest == {name: {**entry, "license": None} for name, entry in trained.items()}
    for path in student.iterdir():
        if path.suffix in (".md", ".yaml", ".json"):
            assert str(tmp_path) not in path.read_text() and str(image_folder) not in path.read_text()
    # the card is its author's: the same command leaves it as it is
    (student / "README.md").write_text("mine")
    train(recipe)
    assert (student / "README.md").read_text() == "mine"


def test_a_shared_recipe_has_no_folders_passwords_or_queries(make_recipe, tmp_path):
    recipe = load_recipe(make_recipe())
    sources = {
        "disk": SourceConfig(f"{tmp_path}/secret/photos/*.tar", image_root=str(tmp_path)),
        "home": SourceConfig("~/photos"),
        "web": SourceConfig("https://me:password@example.com/a/{000..009}.tar?key=secret"),
        "hub": SourceConfig("pixparse/cc12m-wds", weight=2),
    }
    recipe = replace(recipe, data=replace(recipe.data, path=None, sources=sources), teacher_cache=str(tmp_path))
    shared = portable_recipe(recipe)
    assert {name: source.path for name, source in shared.data.sources.items()} == {
        "disk": "local:*.tar",
        "home": "local:photos",
        "web": "https://example.com/a/{000..009}.tar",
        "hub": "pixparse/cc12m-wds",
    }
    text = yaml.dump(shared)
    assert not any(word in text for word in (str(tmp_path), "secret", "password", os.path.expanduser("~/photos")))
    assert portable_recipe(shared) == shared
    ids, lines = describe_data(shared)
    assert ids == ["pixparse/cc12m-wds"]
    assert [line.startswith("hub: [pixparse/cc12m-wds]") and "40 %" in line for line in lines].count(True) == 1
