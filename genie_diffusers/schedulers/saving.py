"""Saving a scheduler with its source, for those who do not have this package."""

import hashlib
import os
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..standalone import standalone_source
from .saving_itself import write_source


class SavesSource(SchedulerMixin):
    """The part of a scheduler that saves it."""

    # of the scheduler
    _attachment: Any
    _say: Any

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        standalone: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Save the configuration to a folder, from which [`~SchedulerMixin.from_pretrained`] loads it.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder, which is made if it does not exist.
            push_to_hub (`bool`, defaults to `False`):
                Whether to push the folder to the Hub, to the repository `repo_id` or of the name of the folder.
            standalone (`bool`, defaults to `False`):
                Whether to save the source too, as one file that needs nothing of this package. Without the package,
                `AutoModel.from_pretrained(folder, trust_remote_code=True)` of diffusers loads it. What is attached
                is not saved.
            kwargs:
                As in [`~utils.PushToHubMixin.push_to_hub`].

        Raises:
            ValueError: If the class is one of your own whose source does not make one file, see [`standalone_source`].
        """
        if standalone:
            source = standalone_source(type(self))
            if self._attachment is not None:
                self._say(
                    "`standalone=True` saves a scheduler without what is attached to it: where it is loaded, it "
                    "samples as one with nothing attached."
                )
            # diffusers imports files of one name into one module, so different sources have different names
            digest = hashlib.sha256(source.encode()).hexdigest()[:8]
            file = f"{type(self).__module__.rpartition('.')[2]}_{digest}"
            write_source(save_directory, file, source, type(self).__name__)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
