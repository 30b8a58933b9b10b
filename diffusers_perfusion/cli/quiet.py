"""Drop messages of other libraries that are of no use to a user of the command line."""

import logging

# The beginning of each message, by the logger that it comes from.
_MESSAGES = {
    "diffusers.configuration_utils": ("The config attributes ",),
    "diffusers.models.modeling_utils": ("There are modules in ",),
    "diffusers.pipelines.pipeline_utils": ("Expected types for ",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    "torch.utils._pytree": ("%s is an Enum subclass",),
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "transformers.utils.import_utils": (
        "`CLIPImageProcessor` requires torch",
        "`SiglipImageProcessor` requires torch",
    ),
}


def _drop(record: logging.LogRecord) -> bool:
    """Return False for the messages above, whose arguments are not filled in yet."""
    return not str(record.msg).startswith(_MESSAGES[record.name])


def silence_libraries() -> None:
    """Drop the messages above, and the progress bars of loading a model, for the rest of the process."""
    for name in _MESSAGES:
        logging.getLogger(name).addFilter(_drop)

    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
