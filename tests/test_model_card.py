import ast
import re

import pytest
from huggingface_hub import ModelCard

from genie_diffusers.model_card import create_model_card, standalone_usage


def card(**changed) -> ModelCard:
    arguments = {
        "description": "A model.",
        "usage": "print('used')",
        "facts": {"Loss | error": "0.1 | 0.2", "Steps": 10},
        "command": "accelerate launch train.py",
    }
    return create_model_card("user/model", **arguments | changed)


def test_saved_card_keeps_its_metadata(tmp_path):
    card(base_model="user/base", dataset="uoft-cs/cifar10").save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.datasets, data.library_name) == ("user/base", "uoft-cs/cifar10", "diffusers")


def test_unknown_metadata_is_left_out():
    assert not {"base_model", "datasets"} & set(card().data.to_dict())


def test_every_fact_is_one_row_of_the_table():
    rows = [line for line in card().text.splitlines() if line.startswith("| ")]
    assert rows == ["| | |", r"| Loss \| error | 0.1 \| 0.2 |", "| Steps | 10 |"]


def test_picture_is_referenced_relative_to_the_card():
    assert "![Samples.](samples.png)" in card(pictures={"samples.png": "Samples."}).text
    for path in ("/tmp/samples.png", "https://example.org/samples.png"):
        with pytest.raises(ValueError, match="relative to the card"):
            card(pictures={path: "Samples."})


def test_usage_of_a_standalone_scheduler_runs_either_way():
    """One way as it stands, the other once its comments are made code."""
    usage = standalone_usage("user/sampler", "user/base", scheduler="GGDMScheduler", call='pipe("a cat")')
    assert f"```python\n{usage}\n```" in card(usage=usage).text
    with_package = re.sub(r"^# (?=from|pipe)", "", usage, flags=re.MULTILINE)
    loads = [
        [node.func.value.id for node in ast.walk(ast.parse(code)) if is_load(node)] for code in (usage, with_package)
    ]
    assert loads == [["DiffusionPipeline", "AutoModel"], ["DiffusionPipeline", "AutoModel", "GGDMScheduler"]]


def is_load(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
