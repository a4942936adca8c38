"""The one error an artist sees: a sentence that says what is wrong, with which input, and what to do."""


class VideoLDMError(ValueError):
    """Bad input, refused with a sentence; never raised for a fault of the pack itself."""
