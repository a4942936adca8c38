"""Takes out of ComfyUI's log the complaints about packages that the set-up leaves out, and says so in one line.

quiet_log.py copies this file into the environment under .host/, where Python imports it at every start. It is never
used in the ComfyUI of an artist, and it imports nothing of the pack.
"""

import sys

NOTE = ("This ComfyUI was set up by run.py without torchaudio and comfyui-workflow-templates: "
        "it has no audio nodes and none of core's templates.")
MISSING = ("torchaudio missing", "comfyui-workflow-templates is not installed", "comfyui-workflow-templates not found")
MISSING_MODULE = "No module named 'torchaudio'"
FAILED = "Cannot import "                       # core's words for a file of nodes that could not be imported
SUMMARY = ("WARNING: some comfy_extras/ nodes did not import correctly", "IMPORT FAILED: ",
           "\nThis issue might be caused by new missing dependencies", "Please do a: pip install -r requirements.txt")


class LeftOutPackages:
    """A filter for the root logger.

    Core ends its imports with a summary of the files that failed. It is taken out only if every file failed for want
    of a package that the set-up leaves out.
    """

    def __init__(self):
        self.noted = False              # whether NOTE was said
        self.other_failures = False     # whether a file of nodes failed for another reason

    def filter(self, record):
        message = record.getMessage()
        if any(sign in message for sign in MISSING) or MISSING_MODULE in message and "comfy_extras" in message:
            return self.note(record)
        self.other_failures = self.other_failures or message.startswith(FAILED)
        return self.other_failures or not message.startswith(SUMMARY)

    def note(self, record):
        """Let the first complaint through as NOTE, and no other."""
        if self.noted:
            return False
        self.noted = True
        record.msg, record.args, record.levelname, record.levelno = NOTE, (), "INFO", 20
        return True


def is_server(arguments):
    """Whether these arguments of Python start a ComfyUI, and not pip or a test."""
    return any(argument.replace("\\", "/").rsplit("/", 1)[-1] == "main.py" for argument in arguments)


if is_server(getattr(sys, "orig_argv", ())):
    import logging
    logging.getLogger().addFilter(LeftOutPackages())
