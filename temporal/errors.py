"""The error that artists see. Its text says what is wrong, in which file or input, and what to do."""

SHOWN_NAME = "Video LDM"


class VideoLDMError(ValueError):
    """Bad input, refused with a sentence; never raised for a fault of the pack itself.

    ComfyUI's page shows an error's full name in front of its sentence, as "module.name: sentence", and leaves out the
    module of Python's own errors. So this class and its kinds take the pack's name. Pickle cannot find them.
    """

    def __init_subclass__(cls):
        show_as_the_pack(cls)


def show_as_the_pack(cls: type):
    """Let ComfyUI's page name an error class after the pack."""
    cls.__module__, cls.__qualname__ = "builtins", SHOWN_NAME


show_as_the_pack(VideoLDMError)
