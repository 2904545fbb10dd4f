"""Model cards of base models, heads, samplers and classifiers, from facts that the training scripts know."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def create_model_card(
    name: str,
    description: str,
    *,
    usage: str,
    facts: Mapping[str, Any],
    command: str,
    pictures: Mapping[str, str] | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    pipeline_tag: str = "unconditional-image-generation",
) -> ModelCard:
    """
    The card of a trained model. `card.save("README.md")` writes it, `card.push_to_hub(repo_id)` publishes it.

    Args:
        name (`str`): Title of the card.
        description (`str`): What the model is, in Markdown.
        usage (`str`): Python code that uses the model, ready to be copied.
        facts (`Mapping[str, Any]`): What a reader may want to know, as rows of a table: loss, steps, data.
        command (`str`): Shell command that trains the model.
        pictures (`Mapping[str, str]`, *optional*): Path relative to the card → caption.
        base_model (`str`, *optional*): Hub id of the model this one was trained from or belongs to.
        dataset (`str`, *optional*): Hub id of the training data.
        pipeline_tag (`str`, defaults to `"unconditional-image-generation"`): The Hub's word for its task.

    Raises:
        ValueError: If a picture's path is absolute or a URL, so that it would not be published with the card.
    """
    pictures = pictures or {}
    for path in pictures:
        if path.startswith("/") or ":" in path:
            raise ValueError(f"`pictures` must have paths relative to the card, got {path!r}.")
    data = ModelCardData(
        base_model=base_model,
        datasets=dataset,
        library_name="diffusers",
        pipeline_tag=pipeline_tag,
        tags=["diffusers", "genie_diffusers"],
    )
    # A vertical bar would end a cell.
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in facts.items()]
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in cells)
    sections = [
        f"# {name}\n\n{description.strip()}",
        "\n\n".join(f"![{caption}]({path})\n\n*{caption}*" for path, caption in pictures.items()),
        f"## Use\n\n```python\n{usage.strip()}\n```",
        f"## Training\n\n| | |\n|---|---|\n{rows}\n\n```bash\n{command.strip()}\n```",
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
