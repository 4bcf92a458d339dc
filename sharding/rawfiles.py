"""What several raw data sets share: reading their files with errors that say what, where and what to do; poses; PCD."""

from __future__ import annotations

import difflib
import io
import math
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from occstream.sharding import lzf
from occstream.sharding.contract import is_rigid
from occstream.sharding.pickles import loads
from occstream.sharding.rawtree import Place, Tree, raw_place

_ORIENTATION = 0x112  # EXIF tag
_LEFT_BEHIND = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information", "lost+found"}

MOST_UNPACKED = 1 << 30  # bytes of all arrays of one .npz


def read_file(path: Place, why: str = "") -> bytes:
    """Raises ValueError that names the file, ``why`` it is wanted, and the remedy."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: is missing{f' ({why})' if why else ''}; complete the download") from None
    except OSError as error:
        if isinstance(path, Tree):  # its errors name it
            raise ValueError(str(error)) from None
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def read_pickle(path: Place) -> Any:
    """A pickle of plain values and numpy arrays; anything that could run code is refused with ValueError."""
    try:
        return loads(read_file(path))
    except ValueError as error:
        raise ValueError(f"{path}: not loaded: {error}" if str(path) not in str(error) else str(error)) from None


def read_npy(path: Place, why: str = "") -> Any:
    """An ``.npy`` array or the arrays of an ``.npz`` as a dict; object arrays are refused. Raises ValueError."""
    data = read_file(path, why)
    try:
        if data.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > MOST_UNPACKED:
                raise ValueError(f"unpacks to {size} bytes, at most {MOST_UNPACKED} are read")
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        return {name: loaded[name] for name in loaded.files} if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except Exception as error:  # zip, zlib, header: numpy raises whatever they raise
        raise ValueError(f"{path}: not readable as {path.suffix} ({str(error)[:120]}); download it again") from None


def read_rows(path: Place, columns: int) -> np.ndarray:
    """(N, columns) float64 of a text file with ``columns`` numbers in a line. Raises ValueError."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = parse_numbers(line, f"{path}: line {number}")
        if len(row) != columns:
            raise ValueError(f"{path}: needs {columns} numbers in every line; it is damaged or of another format")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: is empty; it needs {columns} numbers in every line; download it again")
    return np.array(rows)


def read_text(path: Place) -> str:
    """UTF-8 text of a file. Raises ValueError."""
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text ({error.reason} at byte {error.start}); download it again") from None


def parse_numbers(text: str, where: object) -> np.ndarray:
    """(N,) float64 of words, all finite. Raises ValueError."""
    try:
        numbers = np.array([float(word) for word in text.split()])
    except ValueError as error:
        raise ValueError(f"{where}: {error}; download the file again") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{where}: a number is not finite; download the file again")
    return numbers


def read_values(path: Place, dtype: str) -> np.ndarray:
    """(N,) of a bare binary file of one type. Raises ValueError if its size does not fit."""
    data = read_file(path)
    if len(data) % np.dtype(dtype).itemsize:
        raise ValueError(f"{path}: {len(data)} bytes are not a multiple of {np.dtype(dtype)}; download it again")
    return np.frombuffer(data, dtype)


def read_points(path: Place, columns: int) -> np.ndarray:
    """(N, columns) float32 of a bare binary file. Raises ValueError if its size does not fit."""
    data = read_file(path)
    if not data or len(data) % (4 * columns):
        others = [c for c in (3, 4, 5, 6) if data and c != columns and len(data) % (4 * c) == 0]
        hint = f"it looks like {others[0]} columns" if len(others) == 1 else "it is damaged, download it again"
        raise ValueError(f"{path}: {len(data)} bytes are not a multiple of {columns} x float32 points; {hint}")
    return np.frombuffer(data, np.float32).reshape(-1, columns)


def read_pcd(path: Place) -> dict[str, np.ndarray]:
    """Fields of a PCD file (ascii, binary or binary_compressed), each (N,) in its own type. Raises ValueError."""
    data = read_file(path)
    head, at = _pcd_head(data, path)
    try:
        names, kind = head["FIELDS"], _pcd_type(head)
        points, coding = int(head["POINTS"][0]), head["DATA"][0]
        if points < 0:
            raise ValueError(f"{points} points")
        if coding == "binary":
            rows = np.frombuffer(data, kind, points, at)
        elif coding == "ascii":
            table = np.loadtxt(io.BytesIO(data[at:]), ndmin=2) if data[at:].strip() else np.zeros((0, len(names)))
            rows = np.zeros(len(table), kind)
            for i, name in enumerate(names):
                rows[name] = table[:, i]
            if len(rows) != points:
                raise ValueError(f"holds {len(rows)} points, its header says {points}")
        elif coding == "binary_compressed":
            rows = _pcd_unpacked(data[at:], kind, points)
        else:
            raise ValueError(f"DATA {coding} is not known; convert it with pcl_convert_pcd_ascii_binary to binary")
    except (KeyError, ValueError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: broken PCD ({type(error).__name__}: {error})") from None
    return {name: rows[name].copy() for name in names}


def _pcd_unpacked(data: bytes, kind: np.dtype, points: int) -> np.ndarray:
    """(points,) of a type from their compressed form, in which each field has all its values in a row. Raises ValueError."""
    packed, size = (int(n) for n in np.frombuffer(data[:8], "<u4", 2))
    if size != points * kind.itemsize or size > MOST_UNPACKED or packed > len(data) - 8:
        raise ValueError(f"{len(data) - 8} bytes that unpack to {size}, {points} points need {points * kind.itemsize}")
    raw, at = lzf.unpack(data[8 : 8 + packed], size), 0
    rows = np.zeros(points, kind)
    for name in kind.names or ():
        field = kind[name]
        rows[name] = np.frombuffer(raw, field.base, points * math.prod(field.shape), at).reshape(points, *field.shape)
        at += points * field.itemsize
    return rows


def _pcd_head(data: bytes, path: Place) -> tuple[dict[str, list[str]], int]:
    """Words after each keyword of a PCD header, and where the points begin."""
    head: dict[str, list[str]] = {}
    at = 0
    while "DATA" not in head:
        end = data.find(b"\n", at)
        if end < 0 or len(head) > 20:
            raise ValueError(f"{path}: no PCD header; it is damaged or not a .pcd file")
        words = data[at:end].decode(errors="replace").split()
        at = end + 1
        if words and not words[0].startswith("#"):
            head[words[0].upper()] = words[1:]
    return head, at


def _pcd_type(head: dict[str, list[str]]) -> np.dtype:
    """Type of a point in a PCD file. Raises ValueError or KeyError if its header gives none."""
    names, counts = head["FIELDS"], head.get("COUNT", ["1"] * len(head["FIELDS"]))
    if not set(head["SIZE"]) <= {"1", "2", "4", "8"} or not all(c.isascii() and c.isdigit() for c in counts):
        raise ValueError(f"sizes {head['SIZE'][:8]} or counts {counts[:8]} are none")
    if any(not 1 <= int(c) <= 1000 for c in counts):
        raise ValueError(f"counts {counts[:8]} are out of range 1..1000")
    kinds = [{"F": "f", "U": "u", "I": "i"}[t] + size for t, size in zip(head["TYPE"], head["SIZE"], strict=True)]
    return np.dtype([(n, f"<{k}", (int(c),) if c != "1" else ()) for n, k, c in zip(names, kinds, counts, strict=True)])


def read_jpeg(path: Place, why: str = "", quality: int = 95) -> tuple[bytes, int, int]:
    """JPEG bytes, width, height of an image file.

    A color or gray JPEG is taken as it is; what else a viewer opens (PNG, WebP, BMP, TIFF, a CMYK JPEG) is encoded once,
    as 4:4:4.

    Raises:
        ValueError: missing, not an image, or one that is to be shown turned: its calibration cannot mean both.
    """
    data = read_file(path, why)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises whatever its plug-ins raise; what it does not know, the decoder below may
        turn = 1
    if turn not in (0, 1):
        raise ValueError(
            f"{path}: is marked for rotated display (EXIF orientation {turn}), so width, height and intrinsics may refer "
            "to the stored or the rotated image; rotate the pixels and remove the mark (jpegtran -rotate, exiftool -Orientation=)"
        )
    try:
        if data.startswith(b"\xff\xd8"):
            height, width, space, *_ = simplejpeg.decode_jpeg_header(data)
            if space not in ("CMYK", "YCCK"):
                return data, int(width), int(height)
        image = None
        if data:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ValueError(f"{len(data)} bytes of no known format, or damaged")
    except (ValueError, cv2.error) as error:
        raise ValueError(f"{path}: not a readable image ({error}); download it again") from None
    jpeg = simplejpeg.encode_jpeg(image, quality, "BGR", "444")
    return jpeg, image.shape[1], image.shape[0]


def entries(folder: Place, pattern: str = "*") -> list[Place]:
    """Paths below a folder that match, sorted, without what operating systems leave there (.DS_Store, ._x, Thumbs.db…)."""
    return sorted(
        path
        for path in folder.glob(pattern)
        if not any(part.startswith(".") or part.lower() in _LEFT_BEHIND for part in path.parts[len(folder.parts) :])
    )


def numbered(folder: Place, ending: str) -> list[int]:
    """Numbers of files that are named ``<number><ending>``, sorted. Raises ValueError for another name."""
    numbers = []
    for path in entries(folder, f"*{ending}"):
        stem = path.name.removesuffix(ending)
        if not (stem.isascii() and stem.isdigit()):
            raise ValueError(f"{path}: its name is not a number and {ending}; move it elsewhere")
        numbers.append(int(stem))
    return sorted(numbers)


def pose_of(translation: Sequence[float], rotation: Sequence[float]) -> np.ndarray:
    """(4, 4) float64 of a translation in meters and a quaternion w, x, y, z."""
    w, x, y, z = (float(part) for part in rotation)
    length = math.sqrt(w * w + x * x + y * y + z * z)
    if not length > 0:
        raise ValueError(f"rotation {[w, x, y, z]} is not a quaternion")
    w, x, y, z = w / length, x / length, y / length, z / length
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = translation
    return pose


def rigid(matrix: np.ndarray, where: object) -> np.ndarray:
    """(4, 4) float64 of 12 or 16 numbers in row order. Raises ValueError that names ``where`` if they are no pose."""
    pose = np.eye(4)
    try:
        flat = np.asarray(matrix, np.float64).reshape(-1)
        pose[: len(flat) // 4] = flat.reshape(-1, 4)
    except (ValueError, TypeError):
        raise ValueError(f"{where}: is not 12 or 16 numbers") from None
    if not is_rigid(pose):
        raise ValueError(f"{where}: is not a rigid pose (rotation and translation, finite): {pose.tolist()}")
    return pose


Wanted = int | tuple[str, ...] | None
"""Of scenes: so many, from the first on; by name; or all."""


def choose(wanted: int | Iterable[str] | None, there: Sequence[str], where: object) -> list[str]:
    """Scene names to read: all that are there, the first ones, or the wanted ones. Raises ValueError that names the nearest."""
    if wanted is None:
        return list(there)
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(there):
            raise ValueError(f"{where}: {wanted} scenes are wanted, there are {len(there)}")
        return list(there[:wanted])
    for name in wanted:
        if name not in there:
            near = difflib.get_close_matches(name, there, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: has no scene {name!r}{hint}")
    return list(wanted)


def listed(what: str, names: Sequence[str], most: int = 5) -> str:
    """ "3 scenes: a, b, c", with the first few names alone where there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({', '.join(names[:most])}{more})"


def existing_folder(root: str | Place, holds: str) -> Place:
    """A folder, by path, URL or inside a zip archive. Raises ValueError if there is none; ``holds`` says what it should hold."""
    folder = raw_place(root) if isinstance(root, str) else root
    if not folder.is_dir():
        raise ValueError(f"{root}: no such folder; give the one that holds {holds}")
    return folder


def sparse_to_dense(
    index: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int, int],
    fill: int,
    *,
    where: object,
    doubles: Literal["last", "most"] = "last",
) -> np.ndarray:
    """(X, Y, Z) uint8 of voxel rows.

    Args:
        index: (N, 3) integers x, y, z.
        values: (N,) class ids.
        fill: of all other voxels.
        where: file, for errors.
        doubles: which class a voxel has that is listed more than once, by the rule of the data set's own loader: that of its
            last row, or the most frequent (of equals the smallest).

    Raises:
        ValueError: an index is out of the grid, or a value is no class.
    """
    index, values = np.asarray(index), np.asarray(values)
    for what, numbers in (("indices", index), ("classes", values)):
        if numbers.dtype.kind not in "fiub" or (numbers.dtype.kind == "f" and not np.isfinite(numbers).all()):
            raise ValueError(f"{where}: its {what} are not finite numbers; it is damaged or of another format")
    index = index.astype(np.int64)
    if len(index) and ((index < 0).any() or (index >= shape).any()):
        bad = index[((index < 0) | (index >= shape)).any(1)][0]
        raise ValueError(
            f"{where}: voxel {tuple(bad.tolist())} is outside the {shape} grid; wrong label set or axis order?"
        )
    if len(values) and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"{where}: class {values.max() if values.max() > 255 else values.min()} is out of range")
    dense = np.full(shape, fill, np.uint8)
    flat = np.asarray(np.ravel_multi_index(tuple(index.T), shape))
    if doubles == "most":
        pairs, counts = np.unique(flat * 256 + values.astype(np.int64), return_counts=True)
        order = np.lexsort((-(pairs % 256), counts, pairs // 256))  # the winner of each voxel comes last
        flat, values = pairs[order] // 256, pairs[order] % 256
    # Of several rows the last one stays; numpy does not promise it, so the others are taken out.
    _, reverse = np.unique(flat[::-1], return_index=True)
    last = len(flat) - 1 - reverse
    dense.reshape(-1)[flat[last]] = values[last]
    return dense
