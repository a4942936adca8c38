"""Damage to model files, drawn by a seed. Each damage takes a file's bytes and gives other bytes.

Some damage hits the whole of a file, as a bad disk or download does. Other damage hits its parts, as a careless or
hostile program does. These parts are headers, metadata, names, shapes, types and values, the directory of an archive,
and the instructions of a pickle.
"""

import copy
import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable

import torch

NASTY = ("", " ", "-1", "0", "1.5", "1e999", "-1e999", "nan", "inf", "true", "null", "None", "[", "{}", "[]",
         "[[1e999]]", "[[]]", "[" * 1000, "[" * 1000 + "]" * 1000, '{"a":' * 300 + "1" + "}" * 300, "9" * 30,
         "9" * 5000, "1000000000", "2147483648", "-9223372036854775809", "\u0661\u0662", "\x00", "line\nline",
         "\ud7ff\u202e", "x" * 100_000, "[NaN]", '{"a": [true]}', '"8"')
VALUES = (None, True, False, -1, 0, 1, 3, 1.5, 1e308, float("inf"), float("nan"), 10 ** 9, 10 ** 30, -(10 ** 18), "",
          "8", "x" * 10_000, [], [[]], {}, [1] * 100_000, [0], [-1], [10 ** 9], [[1, 2, 3]], {"a": 1},
          [[[[[[[[[1]]]]]]]]])
TYPES = ("F32", "F16", "BF16", "F64", "I8", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "C64", "U4", "", "f32")
NUMBERS = (-1, 0, 1, 3, 2 ** 31, 2 ** 40, 2 ** 63, 10 ** 30, 1.0, None, "4")


# The whole file

def flipped(data: bytes, draw: random.Random, start: int = 0, end: int | None = None) -> bytes:
    """One to eight bits turned over, within a part of the file."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(start, min(end or len(data), len(data)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(min(len(data), draw.choice((16, 2000, len(data)))))]


def spliced(data: bytes, draw: random.Random) -> bytes:
    """A piece of the file left out, doubled, or overwritten with zeros or ones."""
    start = draw.randrange(min(len(data), draw.choice((64, 4000, len(data)))))
    end = min(len(data), start + draw.choice((1, 8, 100, 5000)))
    middle = draw.choice((b"", data[start:end] * 2, bytes(end - start), b"\xff" * (end - start)))
    return data[:start] + middle + data[end:]


WHOLE = (flipped, cut, spliced)


# safetensors

def parts(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + length]), data[8 + length:]


def joined(header, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def keys_of(header: dict) -> list[str]:
    return [key for key in header if key != "__metadata__"]


def header_flipped(data: bytes, draw: random.Random) -> bytes:
    return flipped(data, draw, 0, 8 + struct.unpack("<Q", data[:8])[0])


def metadata_entry(data: bytes, draw: random.Random) -> bytes:
    """One entry of the metadata says something else, or is gone, or has no text for its value."""
    header, body = parts(data)
    metadata = header.setdefault("__metadata__", {})
    key = draw.choice([*metadata, "more"])
    metadata[key] = draw.choice(NASTY) if draw.random() < 0.85 else draw.choice(VALUES)
    if draw.random() < 0.1:
        metadata.pop(key)
    return joined(header, body)


def metadata_value(data: bytes, draw: random.Random) -> bytes:
    """One value deep in an entry of JSON is another one, gone, or repeated."""
    header, body = parts(data)
    metadata = header.get("__metadata__", {})
    entries = [key for key, text in metadata.items() if text[:1] in ("{", "[")]
    if not entries:
        return metadata_entry(data, draw)
    entry = draw.choice(entries)
    value = json.loads(metadata[entry])
    places = list(inner(value))
    if places:
        holder, key = draw.choice(places)
        change = draw.random()
        if change < 0.8:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        elif change < 0.9:
            del holder[key]
        elif isinstance(holder, list):
            holder.extend(holder * 3)
    metadata[entry] = json.dumps(value)
    return joined(header, body)


def inner(value):
    """Every place in a value of JSON, as (list or dictionary, index or key)."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(part, (dict, list)):
            yield from inner(part)


def renamed(data: bytes, draw: random.Random) -> bytes:
    """A tensor under another name: of another tensor, with another number in it, or of no sense."""
    header, body = parts(data)
    key = draw.choice(keys_of(header))
    other = draw.choice(keys_of(header))
    numbered = "".join(draw.choice(("9", "99999999", "7" * 200)) if letter.isdigit() else letter for letter in key)
    name = draw.choice((other, numbered, numbered, "x", "", "x" * 5000, key + "\n", "\u0416" + key, key.upper()))
    header[name], header[key] = header[key], header.get(name, header[key])
    if draw.random() < 0.7 and name != key:
        header[name] = header.pop(key)
    return joined(header, body)


def described(data: bytes, draw: random.Random) -> bytes:
    """A tensor's shape, type or place says something else."""
    header, body = parts(data)
    entry = header[draw.choice(keys_of(header))]
    kind = draw.choice(("dtype", "shape", "shape", "data_offsets", "turned", "split", "gone"))
    if kind == "dtype":
        entry["dtype"] = draw.choice(TYPES)
    elif kind == "turned":
        entry["shape"] = entry["shape"][::-1] + [1] * draw.randrange(3)
    elif kind == "split":
        entry["shape"] = draw.choice(([2, *entry["shape"]], [0], [], [1] * 500, [-1], entry["shape"] * 2))
    elif kind == "gone":
        entry.pop(draw.choice(list(entry)))
    elif entry[kind]:
        entry[kind][draw.randrange(len(entry[kind]))] = draw.choice(NUMBERS)
    return joined(header, body)


def without_or_more(data: bytes, draw: random.Random) -> bytes:
    """A tensor less, with its bytes or without, or one more, of no size or of some."""
    header, body = parts(data)
    key = draw.choice(keys_of(header))
    change = draw.randrange(3)
    if change == 0:
        header.pop(key)
    elif change == 1:
        start, end = header.pop(key)["data_offsets"]
        body = body[:start] + body[end:]
        for entry in (header[key] for key in keys_of(header)):
            if entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    else:
        size = draw.choice((0, 4))
        name = draw.choice((key + ".more", "more", key.replace("0", "5"), key.replace("1", "40000")))
        header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(body), len(body) + size]}
        body += bytes(size)
    return joined(header, body)


def not_finite(data: bytes, draw: random.Random) -> bytes:
    """NaN or infinity in one place of one tensor."""
    header, body = parts(data)
    entry = header[draw.choice([key for key in keys_of(header) if header[key]["shape"] != [0]])]
    start, end = entry["data_offsets"]
    bits = {"F32": (b"\x00\x00\x80\x7f", b"\x01\x00\xc0\xff"), "F16": (b"\x00\x7c", b"\x01\xfe")}[entry["dtype"]]
    value = draw.choice(bits)
    place = start + len(value) * draw.randrange((end - start) // len(value))
    return joined(header, body[:place] + value + body[place + len(value):])


def of_another_type(data: bytes, draw: random.Random) -> bytes:
    """All or one of the tensors stored in another type of the same width."""
    header, body = parts(data)
    widths = {"F32": ("I32", "U32"), "F16": ("BF16", "I16", "U16")}
    for key in draw.choice((keys_of(header), [draw.choice(keys_of(header))])):
        header[key]["dtype"] = draw.choice(widths[header[key]["dtype"]])
    return joined(header, body)


SAFETENSORS = (header_flipped, metadata_entry, metadata_entry, metadata_value, metadata_value, renamed, described,
               without_or_more, not_finite, of_another_type)


# torch

def saved(content) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def loaded(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), weights_only=True)


def in_itself(tensors: dict) -> dict:
    tensors["state_dict"] = tensors
    return tensors


def nested(tensors: dict, times: int) -> dict:
    for _ in range(times):
        tensors = {"model": tensors}
    return tensors


def changed(tensors: dict, key: str, value) -> dict:
    return {**tensors, key: value}


def repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    return tensor.reshape(-1)[:1].expand(times, tensor.shape[-1] if tensor.ndim else 1)


def state_changed(data: bytes, draw: random.Random) -> bytes:
    """What torch.save was given is another thing: wrapped, of another kind, repeated, not finite, strangely named."""
    tensors = dict(loaded(data))
    key = draw.choice(list(tensors))
    tensor = tensors[key]
    change = draw.choice((
        lambda: in_itself(tensors), lambda: nested(tensors, 3), lambda: nested(tensors, 400),
        lambda: list(tensors.values()),
        lambda: {**tensors, 7: tensor, (1, 2): tensor, None: 3}, lambda: changed(tensors, "k" * 1_000_000, tensor),
        lambda: changed(tensors, key, repeated(tensor, 10 ** 6)), lambda: changed(tensors, key, tensor.to_sparse()),
        lambda: changed(tensors, key, tensor.to("meta")), lambda: changed(tensors, key, tensor.to(torch.complex64)),
        lambda: changed(tensors, key, tensor > 0), lambda: changed(tensors, key, tensor.expand(1, *tensor.shape)),
        lambda: changed(tensors, key, torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)),
        lambda: changed(tensors, key, torch.nn.Parameter(tensor)), lambda: changed(tensors, key, tensor.half()),
        lambda: changed(tensors, key, torch.full_like(tensor, draw.choice((float("nan"), float("inf"))))),
        lambda: changed(tensors, key, tensor.to(torch.float8_e4m3fn)), lambda: changed(tensors, key, str(key)),
        lambda: changed(tensors, key, tensor.t() if tensor.ndim == 2 else tensor[None]),
        lambda: changed(tensors, key.replace("0", "99999999"), tensor),
        lambda: {k: v for k, v in tensors.items() if k != key},
        lambda: {name: tensors[key] for name in tensors}, lambda: changed(tensors, "a\nb", tensor),
        lambda: changed(tensors, key, torch.nested.as_nested_tensor([torch.zeros(2, 3), torch.zeros(3, 3)])),
    ))
    return saved(change())


def rewritten(data: bytes, member: Callable[[str, bytes], bytes], compression=zipfile.ZIP_STORED) -> bytes:
    """The archive with other members, whose checksums are right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, member(name, old.read(name)))
    return stream.getvalue()


def archive_changed(data: bytes, draw: random.Random) -> bytes:
    """A damaged directory, a member less or shorter, or everything compressed."""
    change = draw.randrange(4)
    if change == 0:
        return flipped(data, draw, data.rindex(b"PK\x01\x02") - draw.choice((0, 500)))
    if change == 1:
        return rewritten(data, lambda name, content: content, zipfile.ZIP_DEFLATED)
    if change == 2:
        return rewritten(data, lambda name, content: content[: len(content) // 2] if draw.random() < 0.1 else content)
    return flipped(data, draw, max(0, len(data) - 200))


def pickle_changed(data: bytes, draw: random.Random) -> bytes:
    """An instruction of the pickle, or what it works on, is another one."""
    def change(content: bytes) -> bytes:
        places = [place for _, _, place in pickletools.genops(content)]
        first, last = sorted(draw.sample(range(len(places)), 2))
        kind = draw.randrange(5)
        if kind == 0:
            code = draw.choice(pickletools.opcodes).code.encode("latin-1")
            return content[:places[first]] + code + content[places[first] + 1:]
        if kind == 1:
            return flipped(content, draw)
        if kind == 2:
            return content[:places[first]] + content[places[min(first + draw.randrange(1, 4), len(places) - 1)]:]
        if kind == 3:
            return content[:places[first]] + content[places[first]:places[last]] + content[places[first]:]
        return cut(content, draw)
    if not data.startswith(b"PK"):
        if draw.random() < 0.2:
            return change(data[:20_000].rpartition(b".")[0] + b".")
        return flipped(data, draw, 0, 20_000)
    return rewritten(data, lambda name, content: change(content) if name.endswith("data.pkl") else content)


TORCH = (state_changed, state_changed, state_changed, pickle_changed, pickle_changed, pickle_changed)


def damages(file) -> tuple:
    """What can be done to a file."""
    if file.safetensors:
        return WHOLE + SAFETENSORS
    return WHOLE + TORCH + ((archive_changed,) if file.path.read_bytes().startswith(b"PK") else ())
