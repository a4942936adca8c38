"""The error that artists see. Its text says what is wrong, in which file or input, and what to do."""


class VideoLDMError(ValueError):
    """Bad input, refused with a sentence. It is never raised for a fault of the pack itself."""


# ComfyUI's page shows "module.name: sentence" for an error, and "name: sentence" for Python's own errors. So the class
# pretends to be one of Python's own, with the name of the pack. A side effect: pickle cannot find the class.
SHOWN_NAME = "Video LDM"
VideoLDMError.__module__, VideoLDMError.__qualname__ = "builtins", SHOWN_NAME
