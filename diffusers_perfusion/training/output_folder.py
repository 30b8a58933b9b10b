"""The output folder of a training: checked before any long work, and kept to one training at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..concept_file import WEIGHT_NAME, ConceptHeader
from ..files import check_writable, delete_temporaries
from .checkpoints import list_checkpoints
from .config import TrainingConfig
from .validation import IMAGES_FOLDER


def check_output_folder(config: TrainingConfig) -> None:
    """Raise an error if the files of a training cannot be written, or would replace another token's.

    Raises:
        OSError: if nothing can be written into the output folder, or those of images and trackers in it.
        ValueError: if it has a concept of another placeholder token, or one that cannot be read, or checkpoints of
            another.
    """
    folder = Path(config.output_dir)
    check_writable(folder)
    if config.validation_prompt:
        check_writable(folder / IMAGES_FOLDER)
    if config.report_to:
        check_writable(folder / config.logging_dir)
    if (folder / WEIGHT_NAME).is_dir():
        raise ValueError(
            f"{folder / WEIGHT_NAME} is a folder, and the concept file is to be there; choose another output_dir"
        )
    for path in (folder / WEIGHT_NAME, *(checkpoint / WEIGHT_NAME for checkpoint in list_checkpoints(folder))):
        try:
            token = ConceptHeader.read(path).placeholder_token
        except FileNotFoundError:
            continue
        except ValueError as error:
            if path.parent != folder:
                continue  # a damaged checkpoint is skipped when the training is resumed
            raise ValueError(f"{error}; delete it, or choose another output_dir") from error
        if token != config.placeholder_token:
            raise ValueError(
                f"{path} is of {token}, and this training is of {config.placeholder_token}; choose another output_dir"
            )


@contextmanager
def claim_output_folder(config: TrainingConfig) -> Iterator[None]:
    """Make the output folder, delete what killed trainings have left half-written, and keep other trainings out.

    Raises:
        OSError: if the folder cannot be made or written.
        ValueError: if another training is writing into it, or as `check_output_folder`.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout as error:
            raise ValueError(
                f"another training is writing into {folder}; choose another output_dir, or wait for it"
            ) from error
        except (OSError, NotImplementedError):
            pass  # some file systems have no locks
        check_output_folder(config)  # another training may have written into it until now
        delete_temporaries(folder)
        delete_temporaries(folder / IMAGES_FOLDER)
        yield
