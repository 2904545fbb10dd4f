"""How a scheduler of a stand-alone file is saved: with that file. There it is in the place of `saving`."""

import json
import os
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin


class SavesSource(SchedulerMixin):
    """The part of a scheduler that saves it, with the file that it is defined in."""

    def __new__(cls, *args, **kwargs):
        scheduler = super().__new__(cls)
        if cls.__module__ == __name__:
            # A pipeline writes down the module of each component, and looks for a file of that name beside its
            # configuration: the file that is saved there, not the module as which it was loaded.
            scheduler.__module__ = Path(__file__).stem
        return scheduler

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """[`SchedulerMixin.save_pretrained`], with this file: what was loaded with it is loaded so again."""
        kwargs.pop("standalone", None)
        if type(self).__module__ == __name__:
            file = Path(__file__)
            write_source(save_directory, file.stem, file.read_text(encoding="utf-8"), type(self).__name__)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)


def write_source(folder: str | os.PathLike, file: str, source: str, name: str) -> None:
    """Write what `AutoModel` needs to load the class `name` beside its configuration: `source`, and where it is."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{file}.py").write_text(source, encoding="utf-8")
    config = {"_class_name": name, "auto_map": {"AutoModel": f"{file}.{name}"}}
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
