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


def standalone_usage(
    repo_id: str,
    base_model: str,
    *,
    scheduler: str = "GenieScheduler",
    call: str = "pipe(num_inference_steps=10)",
) -> str:
    """
    The `usage` of a scheduler that was saved with `standalone=True`: with diffusers alone, and with this package.

    Args:
        repo_id (`str`): Hub id of the scheduler.
        base_model (`str`): Hub id of the pipeline that it is for.
        scheduler (`str`, defaults to `"GenieScheduler"`): Its class.
        call (`str`, defaults to `"pipe(num_inference_steps=10)"`): What draws a picture.
    """
    return f"""
from diffusers import AutoModel, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base_model}")
# with diffusers (0.36 or later) alone, which runs the code that is a file of this repository
pipe.scheduler = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
# or with genie_diffusers installed, which reads nothing but the configuration:
# from genie_diffusers import {scheduler}
# pipe.scheduler = {scheduler}.from_pretrained("{repo_id}")
image = {call}.images[0]
""".strip()
