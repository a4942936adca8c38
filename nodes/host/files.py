"""Files, folders, progress and Cancel: thin wrappers around ComfyUI's own, shared by the pack's nodes."""

import os
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args

from ...temporal.errors import VideoLDMError
from ...temporal.families import known_as
from ...temporal.families import layout_limits as limits_of
from ...temporal.formats.files import check_regular
from ...temporal.formats.safetensors_files import ENDINGS
from .api import io, ui
from .sockets import Hidden

# Kinds of model files, by folder_paths' names
LAYERS, MOTION_LORA, SPARSE_CONTROL = "video_ldm", "video_ldm_motion_lora", "video_ldm_sparse_control"
DECODER_KINDS = (LAYERS, "vae", "checkpoints")                  # kinds among which a decoder is looked for, in order
ALL_KINDS = (LAYERS, MOTION_LORA, SPARSE_CONTROL, "vae", "checkpoints")         # the same of a file to convert
DEMO_FOLDER = Path(__file__).resolve().parents[2] / "models" / "demo"
DEMO_DECODER = "video_ldm_driving_decoder.safetensors"
DEMO_LAYERS = "video_ldm_"      # the demo's temporal files begin so; Load Demo Models loads its other files
# Folders of other packs in which an artist may already have files of a kind.
NEIGHBOURS = {LAYERS: "animatediff_models", MOTION_LORA: "animatediff_motion_lora", SPARSE_CONTROL: "controlnet"}
DATE = re.compile(r"%date:([^%]+)%")
DATE_MARKS = re.compile("yyy?y?|MM?|dd?|HH?|hh?|mm?|ss?")
SAFETENSORS, FORBIDDEN = ENDINGS, frozenset('/\\:*?"<>|')       # endings of such files; letters no file name may have
MOST_COLOURS = 64               # of a layout file, for which the page has room
ON_WINDOWS = os.name == "nt"
DRIVE = re.compile(r"[A-Za-z]:(?=[/\\])")       # at the beginning of a full path
LONGEST_NAME = 220              # bytes of the 255 that disks allow; the rest is for a number and an ending


def register_folders(kind: str = LAYERS) -> None:
    """Register models/video_ldm, the demo's folder and existing folders of other packs as one list.

    Every listing calls it again, for other packs may register their folders later. Calling it twice changes nothing.
    """
    own = os.path.join(folder_paths.models_dir, "video_ldm")
    folder_paths.add_model_folder_path(kind, own, is_default=True)
    neighbour = NEIGHBOURS[kind]
    known = folder_paths.folder_names_and_paths.get(neighbour, ([], set()))[0]
    for folder in [*known, os.path.join(folder_paths.models_dir, neighbour)]:
        if os.path.isdir(folder):
            folder_paths.add_model_folder_path(kind, folder)
    if kind == LAYERS:
        folder_paths.add_model_folder_path(kind, str(DEMO_FOLDER))
    folder_paths.folder_names_and_paths[kind][1].update(folder_paths.supported_pt_extensions)


def list_files(kind: str = LAYERS) -> list[str]:
    """Names for a loader's list, sorted."""
    register_folders(kind)
    return [name for name in folder_paths.get_filename_list(kind) if not _is_other_demo_file(kind, name)]


def loader_list(takes: str, demo: str | None = None, kind: str = LAYERS) -> dict:
    """`options` and `default` of a loader's list.

    Args:
        takes: what the loader loads, in the words of `Identified.takes` or of `Identified.kind`.
        demo: the bundled file that is the default.
        kind: the kind of files to list.
    """
    return _ordered_list(list_files(kind), lambda name: folder_paths.get_full_path(kind, name), takes, demo)


def _ordered_list(names: Iterable[str], path_of: Callable, takes: str, demo: str | None) -> dict:
    """Files that the loader takes come first, then files that could be, then the others.

    All are in the list. ComfyUI refuses a saved workflow that names a file outside it, and does not say why; the loader
    does.
    """
    def order(name: str) -> int:
        found = _glance(path_of(name))
        return 1 if found is None else 0 if takes in found else 2
    names = sorted(names, key=order)
    return {"options": names, "default": demo if demo in names else next(iter(names), None)}


def _glance(path: str | None) -> frozenset | None:
    """`known_as` of a file, empty for anything but a plain file: reading a pipe would wait for ever."""
    if path is None or not os.path.isfile(path):
        return frozenset()
    return _glance_once(path, *path_fingerprint(path))


@lru_cache(maxsize=4096)
def _glance_once(path: str, modified: int, size: int) -> frozenset | None:
    try:
        return known_as(path)
    except Exception:       # the list is shown whatever is wrong with a file; the file's loader reports it
        return frozenset()


def layout_limits() -> dict[str, tuple[tuple[str, ...], int]]:
    """{name: (colours, largest number of boxes)} of the scene layout files in the list. Damaged files are left out."""
    paths = {name: folder_paths.get_full_path(LAYERS, name) for name in list_files()}
    found = {name: _limits_once(path, *path_fingerprint(path)) for name, path in paths.items()
             if "layout" in (_glance(path) or ())}
    return {name: limits for name, limits in found.items() if limits}


@lru_cache(maxsize=256)
def _limits_once(path: str, modified: int, size: int) -> tuple[tuple[str, ...], int] | None:
    try:
        colours, most = limits_of(path)
    except Exception:       # the list is shown whatever is wrong with a file; the file's loader reports it
        return None
    return (colours, most) if len(colours) <= MOST_COLOURS else None


def resolve(name: str, kind: str = LAYERS) -> str:
    """Full path of a name from `list_files`. Raises if the file is gone."""
    register_folders(kind)
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        _refuse_other_than_files(kind, name)
        folders = ", ".join(folder_paths.get_folder_paths(kind))
        raise VideoLDMError(f"There is no file {name} in {folders}. Put it into the first of these and refresh the "
                            "page (R), or choose another file.")
    return path


def _refuse_other_than_files(kind: str, name: str) -> None:
    """Refuse a folder, a named pipe or a device of that name. ComfyUI would only say that there is no such file."""
    for folder in folder_paths.get_folder_paths(kind):
        path = Path(folder) / os.path.relpath(os.path.join("/", name), "/")
        if os.path.exists(path):
            check_regular(path)


def fingerprint(name: str, kind: str = LAYERS) -> tuple[int, int]:
    """(modification time in ns, size in bytes) of the file of that name. It changes when the file does."""
    return path_fingerprint(resolve(name, kind))


def path_fingerprint(path: str | Path) -> tuple[int, int]:
    """The same for a full path. The file is not opened: hashing takes long, and opening a pipe would wait."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise VideoLDMError(f"{Path(path).name} cannot be read ({error.strerror}). Refresh the page (R), or choose "
                            "another file.") from error
    return status.st_mtime_ns, status.st_size


def _is_other_demo_file(kind: str, name: str) -> bool:
    if name.startswith(DEMO_LAYERS) or not (DEMO_FOLDER / name).is_file():
        return False
    return folder_paths.get_full_path(kind, name) == str(DEMO_FOLDER / name)


def list_decoders() -> list[str]:
    """Files that may hold a temporal decoder: the pack's, VAEs, and checkpoints that call themselves SVD."""
    checkpoints = [name for name in folder_paths.get_filename_list("checkpoints") if "svd" in name.lower()]
    return sorted({*list_files(), *folder_paths.get_filename_list("vae"), *checkpoints})


def decoder_list() -> dict:
    """`loader_list` for temporal decoders."""
    return _ordered_list(list_decoders(), _decoder_path, "decoder", DEMO_DECODER)


def _decoder_path(name: str) -> str | None:
    return _path_among(DECODER_KINDS, name)


def _path_among(kinds: tuple[str, ...], name: str) -> str | None:
    paths = (folder_paths.get_full_path(kind, name) for kind in kinds)
    return next((path for path in paths if path is not None), None)


def resolve_decoder(name: str) -> str:
    """Full path of a name from `list_decoders`. Raises if the file is gone."""
    return _resolve_among(DECODER_KINDS, name, "models/video_ldm, models/vae or models/checkpoints")


def _resolve_among(kinds: tuple[str, ...], name: str, folders: str) -> str:
    """Full path of the first file of that name. Raises if there is none. folders: the kinds' folders, for a message."""
    for kind in (kind for kind in kinds if kind in NEIGHBOURS):
        register_folders(kind)
    path = _path_among(kinds, name)
    if path is not None:
        return path
    for kind in kinds:
        _refuse_other_than_files(kind, name)
    raise VideoLDMError(f"There is no file {name} in {folders}. Put it into the first of these and refresh the page "
                        "(R), or choose another file.")


def convertible_list() -> dict:
    """`options` and `default` of a list of all files that may be converted. Torch files come first: they gain most."""
    names = {*list_decoders(), *list_files(MOTION_LORA), *list_files(SPARSE_CONTROL)}
    ordered = sorted(names, key=lambda name: (name.lower().endswith(SAFETENSORS), name))
    return {"options": ordered, "default": next(iter(ordered), None)}


def resolve_convertible(name: str) -> str:
    """Full path of a name from `convertible_list`. Raises if the file is gone."""
    return _resolve_among(ALL_KINDS, name, "models/video_ldm, models/vae or models/checkpoints")


def new_model_file(name: str, source: str) -> Path:
    """Full path of a new safetensors file in models/video_ldm.

    Args:
        name: of the file, with or without its ending, and without folders. "": the name of `source`.
        source: the file that it is made from.
    """
    stem = name.strip() or Path(source).stem
    stem = stem[: -len(SAFETENSORS[0])] if stem.lower().endswith(SAFETENSORS[0]) else stem
    if forbidden_letter(stem) or not stem.strip(". ") or stem.startswith(".") or stem.endswith((".", " ")):
        raise VideoLDMError(f"name is '{_shortened(name)}', and it takes the name of a file without folders, such as "
                            "lavie_base. The file is written to models/video_ldm.")
    if len(os.fsencode(stem)) > LONGEST_NAME:
        raise VideoLDMError(f"name '{_shortened(stem)}' is too long: a file's name can have {LONGEST_NAME} bytes, and "
                            f"this has {len(os.fsencode(stem))}. Shorten it.")
    return Path(folder_paths.models_dir) / "video_ldm" / f"{stem}{SAFETENSORS[0]}"


def input_file(name: str) -> str:
    """Full path of a file chosen in a node, as `clip.mp4` or with its folder, `clip.mp4 [output]`."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise VideoLDMError(f"The file is {_shortened(repr(name))}; it must be the name of a file in ComfyUI's input "
                            "folder.")
    inner, folder = folder_paths.annotated_filepath(name)
    folder = os.path.abspath(folder or folder_paths.get_input_directory())
    path = os.path.abspath(os.path.join(folder, inner))
    if not path.startswith(folder.rstrip(os.sep) + os.sep):
        raise VideoLDMError(f"The file '{_shortened(name)}' leads outside ComfyUI's input folder. Put the file "
                            "into it.")
    return path


def input_fingerprint(name: str) -> tuple[int, int] | None:
    """`fingerprint` for a file in ComfyUI's input folder. None if there is no such file."""
    try:
        return path_fingerprint(input_file(name))
    except (OSError, VideoLDMError):
        return None


@dataclass(frozen=True)
class Target:
    """Where a save node writes. All files of one run have the same numbered stem."""

    folder: Path        # the full path
    subfolder: str      # the same within the output folder, or within the folder for temporary files
    stem: str           # name of the files without their endings
    kind: io.FolderType = io.FolderType.output

    def path(self, ending: str) -> Path:
        return self.folder / (self.stem + ending)

    def result(self, ending: str) -> ui.SavedResult:
        """The entry by which ComfyUI's page finds the file."""
        return ui.SavedResult(self.stem + ending, self.subfolder, self.kind)

    def result_within(self, ending: str, name: str) -> ui.SavedResult:
        """The same for a file in a folder that was written."""
        return ui.SavedResult(name, (Path(self.subfolder) / (self.stem + ending)).as_posix(), self.kind)


def forbidden_letter(name: str, allowed: str = "") -> str | None:
    """The first letter that no name of a file may have, but for those that are allowed. None if there is none."""
    refused = (letter for letter in name if letter in FORBIDDEN or not letter.isprintable())
    return next((letter for letter in refused if letter not in allowed), None)


def check_prefix(prefix: str) -> None:
    """Refuse letters of a filename_prefix that Windows takes in no name. Other systems take them."""
    letter = forbidden_letter(DRIVE.sub("", with_dates(prefix, datetime.now()), count=1), "/\\") if ON_WINDOWS else None
    if letter is not None:
        raise VideoLDMError(f"filename_prefix '{_shortened(prefix)}' gives a name with {letter!r}, which Windows takes "
                            "in no name of a file. Leave it out; write times as %date:HH-mm%.")


def output_target(prefix: str, width: int, height: int) -> Target:
    """A free name in the output folder for a prefix such as `video/clip`, with ComfyUI's %width% and date marks."""
    if not isinstance(prefix, str) or "\0" in prefix:
        raise VideoLDMError(f"filename_prefix is {_shortened(repr(prefix))}; it must be a name such as video/clip.")
    check_prefix(prefix)
    prefix = with_dates(prefix, datetime.now())
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height)
    except OSError as error:
        raise VideoLDMError(f"The folder of filename_prefix '{_shortened(prefix)}' cannot be made in ComfyUI's "
                            f"output folder ({error.strerror}). Choose another name.") from error
    except Exception as error:
        # Core raises an Exception of its own. On Windows Python is first: a path on another drive is a ValueError.
        if not any(words in str(error) for words in ("outside the output folder", "the same drive")):
            raise
        raise VideoLDMError(f"filename_prefix '{prefix}' leads outside ComfyUI's output folder. Use a name, or "
                            "folders inside it such as video/clip.") from error
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise VideoLDMError(f"filename_prefix '{_shortened(prefix)}' is too long: a file's name can have "
                            f"{LONGEST_NAME} bytes, and this has {len(os.fsencode(name))}. Shorten it.")
    return Target(Path(folder), subfolder, f"{name}_{counter:05}_")


def temporary_target() -> Target:
    """A free name in ComfyUI's folder for temporary files, which is emptied when ComfyUI starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return Target(folder, "", f"video_ldm_{secrets.token_hex(8)}_", io.FolderType.temp)


def with_dates(text: str, now: datetime) -> str:
    """Fill in marks such as %date:yyyy-MM-dd%. ComfyUI's page does that for core's save nodes only."""
    return DATE.sub(lambda mark: DATE_MARKS.sub(lambda part: _date_part(part[0], now), mark[1]), text)


def _date_part(mark: str, now: datetime) -> str:
    if mark == "yyyy":
        return str(now.year)
    if mark == "yy":
        return f"{now.year % 100:02}"
    value = {"M": now.month, "d": now.day, "H": now.hour, "h": now.hour, "m": now.minute, "s": now.second}.get(mark[0])
    return mark if value is None else str(value).zfill(len(mark))       # "yyy" means nothing in the page either


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]}..."


def workflow_metadata(hidden: Hidden) -> dict:
    """The metadata that ComfyUI's own save nodes store, from a node's `cls.hidden`. Empty with --disable-metadata."""
    if args.disable_metadata or hidden is None:
        return {}
    metadata = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        metadata["prompt"] = hidden.prompt
    return metadata


def check_cancelled() -> None:
    """Raise ComfyUI's interruption if the artist pressed Cancel. Call it once per frame, window or step."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress(total: int) -> Callable[[int], None]:
    """A function step(done) that moves the running node's progress bar and notices Cancel."""
    bar = comfy.utils.ProgressBar(total)

    def step(done: int) -> None:
        check_cancelled()
        bar.update_absolute(done, total)
    return step


def refuse_beyond_memory(size: int, what: str, advice: str) -> None:
    """Refuse work for which main memory is too small, before it starts.

    Args:
        size: bytes that it needs.
        what: the subject of the sentence, in the plural.
        advice: what the artist can do.
    """
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if size > free:
        raise VideoLDMError(f"{what} need {size / 2**30:.1f} GB of memory and {free / 2**30:.1f} GB are free. {advice}")
