"""The one error an artist sees: a sentence that says what is wrong, with which input, and what to do."""


class VideoLDMError(ValueError):
    """Bad input, refused with a sentence; never raised for a fault of the pack itself."""


# ComfyUI's page shows the error's full name in front of its sentence, "module.name: sentence", and leaves out the module
# of Python's own errors. So the sentence follows the name of the pack. (It also means that pickle cannot find the class.)
SHOWN_NAME = "Video LDM"
VideoLDMError.__module__, VideoLDMError.__qualname__ = "builtins", SHOWN_NAME
