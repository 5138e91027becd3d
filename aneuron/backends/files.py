"""What the file at a path is: a graph for a runtime of its own, or not what `torch.jit.load` takes.

Lives here: the listing of an archive, magic numbers, the first opcodes of a pickle. Must not be here: loading,
unpickling, anything that reads the weights.
"""

import itertools
import json
import os
import pickletools
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

_ZIP = b"PK\3\4"
_LEGACY = 0x1950A86A20F9469CFC6C  # the first of four pickles that torch.save wrote before it wrote archives
_UNPICKLE = (
    "load it yourself (torch.load(path, weights_only=False), which runs the file's code: only if you trust it), and "
    "pass net.eval(), or the path of what torch.jit.save writes"
)
_WEIGHTS = (
    "weights without a model{}: make the module, net.load_state_dict({}), and pass net.eval(), or the path of what "
    "torch.jit.save writes"
)
_MAGIC = {  # by offset and first bytes
    (0, b"\x93NUMPY"): "a NumPy array, not a model",
    (0, b"\x89HDF\r\n"): "an HDF5 file (Keras?), which torch cannot load",
    (0, b"GGUF"): "a GGUF file, which torch cannot load",
    (0, b"version https://git-lfs"): "the pointer of a Git LFS file, not the file itself: run git lfs pull",
    (
        0,
        b"\x7fELF",
    ): "a shared library; load it (torch._inductor.aoti_load_package, or what made it), pass the callable",
    (0, b"<?xml"): "an XML file; if it is OpenVINO's pass backend='openvino' (pip install 'aneuron[openvino]')",
    (4, b"ET"): "an ExecuTorch program; load it with its own runtime, and pass a callable that runs it",
    (8, b'{"'): "a safetensors file, " + _WEIGHTS.format("", "safetensors.torch.load_file(path)"),
}


# Where AOTInductor's packages are run, and why nowhere else.
COMPILED = (
    "an AOTInductor package, which runs in engines only, processes of their own: its Python loader holds the "
    "interpreter for a whole run, in which the event loop stands still, and inputs that it was not compiled for can "
    "end the process instead of raising. Pool(backend='cpu', processes=n) serves its path. Or pass the exported "
    "program that it was compiled from (an ExportedProgram, or the .pt2 that torch.export.save writes), or the module"
)


def is_package(path: str | os.PathLike[str]) -> bool:
    """Whether there is an AOTInductor package in a file, by its content; False where there is no file."""
    return any(map(_of_package, _names_at(path)))


def compiled_for(path: str | os.PathLike[str]) -> str | None:
    """The kind of device that an AOTInductor package says it was compiled for; None if it does not."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if _of_package(name) and name.endswith("_metadata.json"):
                found = json.loads(archive.read(name)).get("AOTI_DEVICE_KEY")
                return None if found is None else str(found)
    return None


def is_program(path: str | os.PathLike[str]) -> bool:
    """Whether there is an exported program in a file, by its content; False where there is no file."""
    return _is_program(_names_at(path))


def _names_at(path: str | os.PathLike[str]) -> list[str]:
    """The names in an archive; none where there is no such file."""
    try:
        with open(path, "rb") as file:
            return _names(file) if file.read(4) == _ZIP else []
    except (OSError, zipfile.BadZipFile):
        return []


def check_script(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` for a file that is known to be no TorchScript, with what it is and what to do.

    Told by content, not by name. What is not known is left to torch. Raises `FileNotFoundError` for no file at all.
    """
    what = _known_at(path)
    if what is not None:
        raise ValueError(f"model={os.fspath(path)!r} is {what}")


def graph_in(model: Any) -> str | None:
    """Whether a path names an "onnx" or an "openvino" graph: by what is in the file, or else by its suffix.

    >>> graph_in("a/model.onnx"), graph_in("model.xml"), graph_in("model.pt")
    ('onnx', 'openvino', None)
    """
    if not isinstance(model, (str, os.PathLike)):
        return None
    head = b""
    with suppress(OSError):
        head = _head(model)
    return _graph_by_content(head) or (None if head.startswith(_ZIP) else _graph_by_suffix(model))


def check_graph(model: Any, kinds: Sequence[str], takes: str) -> None:
    """Raise `ValueError` for a path of what is known to be no graph of these kinds, and for what is no path.

    What is not known is left to the runtime. Raises `FileNotFoundError` for no file at all.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"model={model!r:.80}: {takes}")
    what = _known_at(model)
    kind = None if os.path.isdir(model) else _graph_by_content(_head(model))
    if kind not in kinds and (what is not None or graph_in(model) not in kinds):
        raise ValueError(f"model={os.fspath(model)!r} is {what or 'of another kind'}; {takes}")


BESIDE = " (its weights lie in a file of their own, which must stand beside it, whole)"


def has_external_data(path: str | os.PathLike[str]) -> bool:
    """Whether an ONNX file names other files for its weights. It is read whole: for when it has not loaded."""
    with open(path, "rb") as file:
        return b"\n\x08location\x12" in file.read()  # the key of an entry, and the field that follows


def _head(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _graph_by_content(head: bytes) -> str | None:
    if _is_onnx(head):
        return "onnx"
    return "openvino" if head.startswith(b"<?xml") and b"<net " in head else None


def _graph_by_suffix(path: str | os.PathLike[str]) -> str | None:
    return {".onnx": "onnx", ".xml": "openvino"}.get(os.path.splitext(os.fspath(path))[1].lower())


def _known_at(path: str | os.PathLike[str]) -> str | None:
    """What the file at a path is, and what to do; None for TorchScript, and for what is not known."""
    if os.path.isdir(path):
        return "a directory; pass a file in it, or load the model from it and pass that"
    with open(path, "rb") as file:
        head = file.read(32)
        file.seek(0)
        return _archived(file) if head.startswith(_ZIP) else _known(head, file)


def _is_onnx(head: bytes) -> bool:
    """Whether it begins as protobuf does with ir_version, then a text or the graph."""
    return len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 32 and head[2] in b'\x12\x1a"*2:B'


def _known(head: bytes, file: IO[bytes]) -> str | None:
    if not head:
        return "an empty file"
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return _pickled(file)
    if _is_onnx(head):
        return "an ONNX model; pass backend='onnx' or 'openvino' (pip install 'aneuron[onnx]' or 'aneuron[openvino]')"
    return next((what for (at, magic), what in _MAGIC.items() if head.startswith(magic, at)), None)


def _archived(file: IO[bytes]) -> str | None:
    """What a zip archive is, by the names in it."""
    try:
        names = _names(file)
        with zipfile.ZipFile(file) as archive:
            inner = {name.partition("/")[2]: name for name in names}
            if "constants.pkl" in inner:
                return None  # TorchScript
            if any(map(_of_package, names)):
                return COMPILED
            if _is_program(names):
                return "an exported program, which this backend does not run; pass what it is to run, or backend='cpu'"
            if "data.pkl" in inner:
                with archive.open(inner["data.pkl"]) as pickled:
                    return _pickled(pickled)
            if any(name.endswith(".npy") for name in names):
                return "an archive of NumPy arrays, not a model"
    except zipfile.BadZipFile:
        return "a damaged or incomplete archive"
    return "a zip archive without TorchScript in it; pass the path of what torch.jit.save writes"


def _names(file: IO[bytes]) -> list[str]:
    """The names in an archive. Raises `BadZipFile` for one that is none, or the rest of one that has others in it."""
    with zipfile.ZipFile(file) as archive:
        if min((each.header_offset for each in archive.infolist()), default=0):
            raise zipfile.BadZipFile  # cut off, and what was found is the end of an archive within it
        return archive.namelist()


def _of_package(name: str) -> bool:
    return name.partition("/")[2].startswith("data/aotinductor/")


def _is_program(names: list[str]) -> bool:
    """By the names in an archive; the second is what PyTorch before 2.8 wrote."""
    inner = {name.partition("/")[2] for name in names}
    exported = "archive_format" in inner or "serialized_exported_program.json" in names
    return exported and not any(map(_of_package, names))


def _pickled(file: IO[bytes]) -> str | None:
    """What a pickle makes, by its first opcodes; nothing is made."""
    try:
        top = _first(file)
        if top == str(_LEGACY):
            for _ in range(2):
                for _ in pickletools.genops(file):
                    pass
            top = _first(file)
    except ValueError:
        return "a damaged pickle"
    if top in ("dict", "collections.OrderedDict"):
        return _WEIGHTS.format(" (a state_dict or a checkpoint)", "torch.load(path, weights_only=True)")
    if top.startswith("torch._utils._rebuild_") or top in ("list", "tuple"):
        return f"pickled tensors ({top}), not a model"
    return f"a pickled {top}; {_UNPICKLE}"


def _first(file: IO[bytes]) -> str:
    """The class or the kind of container that a pickle begins with; of a lone number the number."""
    words: list[str] = []
    for opcode, argument, _ in itertools.islice(pickletools.genops(file), 100):
        if opcode.name == "GLOBAL":
            return str(argument).replace(" ", ".")
        if opcode.name == "STACK_GLOBAL":
            return ".".join(words[-2:])
        if opcode.name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            return opcode.name[6:].lower()
        if opcode.name == "STOP":
            break
        if isinstance(argument, str) or opcode.name == "LONG1":
            words.append(str(argument))
    return words[-1] if words else "object"
