"""
Products of packed weights on a CPU, and on a GPU. Copy this folder beside pot.py to make packed layers fast.

pot.cpp multiplies by the codes as they are, with the processor's best instruction set (AMX, AVX-512, AVX2, NEON or
portable C++). decode.cpp runs a whole GPT in one call; decode.py calls it. `load` builds both at the
first use for this machine and keeps the library in the user's cache. triton.py multiplies on a GPU.

NANOPOT_KERNEL=off turns the kernel off. NANOPOT_KERNEL=amx, avx512, avx2, neon or portable forces an instruction set.
NANOPOT_KERNEL=triton uses triton.py on GPUs, and on a CPU if TRITON_INTERPRET=1, which is for tests.
"""

import ctypes
import functools
import glob
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from types import ModuleType

import torch

__all__ = ["Weight", "build", "linear", "load", "load_triton", "read_once", "row_sums", "unpack"]

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "decode.cpp")  # includes pot.cpp
CPU = torch.device("cpu")


class Weight(ctypes.Structure):
    """struct PotWeight of pot.cpp, with pointers into tensors that it keeps alive.

    codes: uint8 tiles, as pot.pack_codes makes them; unit: (1, groups), or (ceil(rows / 16), groups, 16), float16 or
    float32; row_sums: (rows) float32, from `row_sums`, or None; shape: (rows, columns); bits: 3, 4 or 8; levels: of
    all codes, integers; activations: 0: float32; 1: 8 bits per row of x, which needs row_sums; 2: 8 bits per 64 columns.
    Raises ValueError as `address` does, and for groups that do not divide the columns.
    """

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "unit", "row_sums")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups")),
        *((name, ctypes.c_int32) for name in ("bits", "unit_per_row", "unit_is_half", "activations")),
        ("table", ctypes.c_int8 * 16),
    ]

    def __init__(self, codes, unit, row_sums, shape, bits, levels, activations):
        (rows, columns), width = shape, {3: 32, 4: 8, 8: 4}[bits]  # columns of a tile
        blocks, groups, per_row = -(-rows // 16), unit.shape[1] if unit.dim() > 1 else 1, unit.dim() == 3
        if not groups or columns % groups:
            raise ValueError(f"units {tuple(unit.shape)} do not fit a weight of {rows} rows and {columns} columns")
        # Tensors of their own: `.data = ` of the caller's tensors must not free what the pointers point to.
        codes, unit = codes.detach(), unit.detach()
        row_sums = None if row_sums is None else row_sums.detach()
        pointers = (
            address("codes", codes, (blocks, -(-columns // width) * 2 * width * bits), torch.uint8),
            address("unit", unit, (blocks, groups, 16) if per_row else (1, groups), torch.float16, torch.float32),
            None if row_sums is None else address("row_sums", row_sums, (rows,), torch.float32),
        )
        table = (ctypes.c_int8 * 16)(*(levels if bits < 8 else []))  # 8 bits are levels already
        super().__init__(
            *pointers, rows, columns, groups, bits, per_row, unit.dtype == torch.float16, activations, table,
        )  # fmt: skip
        self.tensors = codes, unit, row_sums
        self.key = self.codes, self.unit, activations


def address(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype,
    device: torch.device = CPU,
) -> int:  # fmt: skip
    """Pointer to the values of a tensor, for C++, which reads raw memory. Raises ValueError unless the tensor has this
    shape, one of the dtypes, and lies contiguous on the device. name is for the message."""
    fits = tensor.device == device and tensor.layout == torch.strided and tensor.dtype in dtypes
    if not (fits and tensor.shape == shape and tensor.is_contiguous() and not tensor.is_neg()):
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, in memory with strides "
            f"{tensor.stride() if tensor.layout == torch.strided else tensor.layout}: the kernel takes "
            f"{tuple(shape)} {' or '.join(map(str, dtypes))}, contiguous and on {device}"
        )
    if tensor.untyped_storage().nbytes() < (tensor.storage_offset() + tensor.numel()) * tensor.itemsize:
        raise ValueError(f"{name} has more elements than memory: its storage was resized")
    return tensor.data_ptr()


# -----------------------------------------------------------------------------
# Build and load


TIMEOUT = 600  # seconds for the compiler


class KernelError(ValueError):
    """NANOPOT_KERNEL asks for what this machine cannot do."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library of decode.cpp and pot.cpp. None, with one warning, if it cannot be built; None if it is turned off.

    Raises KernelError if NANOPOT_KERNEL names an instruction set that this machine does not have.
    """
    choice = os.environ.get("NANOPOT_KERNEL", "")
    if choice == "off":
        return None
    choice = "" if choice == "triton" else choice  # which is for another device
    try:
        library = ctypes.CDLL(build(SOURCE))
    except OSError as e:
        lines = str(e).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else e)
        warnings.warn(
            f"PyTorch unpacks packed weights, which is slow, because {SOURCE} cannot be built ({reason}): install g++ or "
            "clang++, and let XDG_CACHE_HOME name a folder that can be written; NANOPOT_KERNEL=off silences this",
            stacklevel=2,
        )
        return None
    weight, pointer, i64 = ctypes.POINTER(Weight), ctypes.c_void_p, ctypes.c_int64
    library.pot_linear.argtypes = [weight, pointer, pointer, i64, i64, pointer, i64, ctypes.c_int]
    library.pot_unpack.argtypes = [weight, pointer, i64, i64, pointer, ctypes.c_int]
    library.pot_row_sums.argtypes = [weight, pointer]
    library.pot_quantize.argtypes = [pointer, i64, pointer, pointer, pointer]
    library.pot_read.argtypes = [pointer, i64, ctypes.c_int]
    library.pot_linear.restype = library.pot_row_sums.restype = None
    library.pot_read.restype = ctypes.c_uint64
    library.pot_instruction_sets.restype = ctypes.c_char_p
    if choice and library.pot_choose(choice.encode()):
        available = library.pot_instruction_sets().decode().replace(" ", ", ")
        raise KernelError(f"NANOPOT_KERNEL={choice}: this machine has {available}; or off, or triton for a GPU")
    return library


def load_triton(device: torch.device) -> ModuleType | None:
    """triton.py, if NANOPOT_KERNEL=triton asks for it and the device is a GPU, or the CPU of Triton's interpreter. None
    otherwise, and, with one warning, if Triton is not installed."""
    kind = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    return _import_triton() if os.environ.get("NANOPOT_KERNEL") == "triton" and device.type == kind else None


@functools.cache
def _import_triton():
    try:
        return importlib.import_module(".triton", __name__)
    except ImportError as e:
        warnings.warn(f"NANOPOT_KERNEL=triton: {e}: pip install triton", stacklevel=2)
        return None


def build(source: str) -> str:
    """Path of the shared library of a C++ file. Builds it if source, compiler, flags or processor are new.

    Raises OSError without a compiler or a cache that is safe to use, and if the compiler fails or takes too long.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("there is no C++ compiler")
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = ["-O3", native, "-std=c++17", "-shared", "-fPIC", "-pthread", "-ldl"]
    key = hashlib.sha256()
    for path in (source, os.path.join(os.path.dirname(source), "pot.cpp")):
        with open(path, "rb") as f:
            key.update(f.read())
    key.update(repr((compiler, _run(compiler, "--version"), flags, _processor())).encode())
    folder = _cache()
    start = os.path.join(folder, f"pot-{key.hexdigest()[:16]}-")
    # The name ends with a digest of the content, because loading a library that is cut short kills the process.
    for path in glob.glob(glob.escape(start) + "*.so"):
        if _is_trusted(path) and path == f"{start}{_digest(path)}.so":
            return path
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    try:  # several processes may build at once: each renames a finished file
        _run(compiler, *flags, "-o", temporary, source)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        path = f"{start}{_digest(temporary)}.so"
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return path


def _run(*command):
    """Runs a command and returns what it prints. Raises OSError if it fails or takes longer than TIMEOUT."""
    with tempfile.TemporaryFile() as output:  # a pipe would wait for the children of a command that was stopped
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"{command[0]} takes longer than {TIMEOUT} s") from None
        output.seek(0)
        text = output.read().decode(errors="replace")
    if done.returncode:
        raise OSError(text.strip() or f"{command[0]} ends with code {done.returncode}")
    return text


def _cache():
    """The folder of libraries. Nobody else may write to it, because a library runs with the rights of whoever loads it.
    Raises OSError if it is another user's."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(home, "nanopot")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if not _is_trusted(folder):
        raise OSError(f"{folder} belongs to another user")
    if os.stat(folder).st_mode & 0o022:  # others may write
        os.chmod(folder, 0o700)
    return folder


def _is_trusted(path):
    return os.name != "posix" or os.stat(path).st_uid in (0, os.geteuid())


def _digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def _processor():
    # Machines of several kinds may share a home folder.
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            return sorted({line for line in f if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return platform.processor()


# -----------------------------------------------------------------------------
# Calls. `load` must have returned a library.


def _loaded() -> ctypes.CDLL:
    library = load()
    assert library is not None, "call load first: it says why there is no library"
    return library


def linear(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., columns) float32 times weight, plus bias (rows) float32 -> (..., rows) float32.

    weight.activations says whether x is rounded to 8 bits, and how. Raises ValueError for tensors that do not fit.
    """
    if x.shape[-1:] != (weight.columns,) or x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}: the kernel takes (..., {weight.columns}) torch.float32 on "
            "the CPU"
        )
    if weight.activations == 1 and not weight.row_sums:
        raise ValueError("8-bit activations per row need the weight's row_sums")
    rows = x.resolve_neg().reshape(-1, weight.columns)
    rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
    end = rows.storage_offset() + (len(rows) - 1) * rows.stride(0) + weight.columns
    if len(rows) and rows.untyped_storage().nbytes() < end * rows.itemsize:
        raise ValueError("x has more elements than memory: its storage was resized")
    y = rows.new_empty(len(rows), weight.rows)
    bias_pointer = None if bias is None else address("bias", bias, (weight.rows,), torch.float32)
    _loaded().pot_linear(
        weight, bias_pointer, rows.data_ptr(), len(rows), rows.stride(0), y.data_ptr(), weight.rows,
        torch.get_num_threads(),
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.rows)


def unpack(weight: Weight, index: torch.Tensor | None = None) -> torch.Tensor:
    """The weight (rows, columns) float32, or only its rows `index` (an int tensor): (*index.shape, columns).

    Raises IndexError for an index out of range, TypeError for one that is not integer, and ValueError for one that is
    not on the CPU.
    """
    library, threads = _loaded(), torch.get_num_threads()
    if index is None:
        out = _empty(weight.rows, weight.columns)
        library.pot_unpack(weight, None, 0, weight.rows, out.data_ptr(), threads)
        return out
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"an index of {index.dtype}: rows are looked up by integers")
    rows, out = index.long().contiguous(), _empty(*index.shape, weight.columns)
    pointer = address("index", rows, index.shape, torch.int64)
    if library.pot_unpack(weight, pointer, 0, rows.numel(), out.data_ptr(), threads):
        raise IndexError(f"an index is out of range: there are {weight.rows} rows")
    return out


def row_sums(weight: Weight) -> torch.Tensor:
    """(rows) float32: sum of unit * level over each row, which products with 8-bit activations per row need."""
    sums = _empty(weight.rows)
    _loaded().pot_row_sums(weight, sums.data_ptr())
    return sums


def _empty(*shape):
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


def read_once(buffer: torch.Tensor) -> int:
    """Reads a contiguous buffer once with all threads, to measure the bandwidth of memory. Returns the sum of its 64-bit
    words, modulo 2^64."""
    return _loaded().pot_read(
        address("buffer", buffer, buffer.shape, buffer.dtype), buffer.nbytes // 8, torch.get_num_threads()
    )


@torch.library.custom_op("nanopot::linear", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_op(
    x: torch.Tensor,
    codes: torch.Tensor,
    unit: torch.Tensor,
    row_sums: torch.Tensor | None,
    levels: list[int],
    rows: int,
    bits: int,
    activations: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear` as an operator, for torch.compile and torch.export: that of triton.py if x's device has it. levels: of all
    codes."""
    kernel = load_triton(x.device) if bits == 4 else None
    if kernel is not None:
        return kernel.linear(x, codes, unit, levels, rows, bias)
    return linear(Weight(codes, unit, row_sums, (rows, x.shape[-1]), bits, levels, activations), x, bias)


@_linear_op.register_fake
def _(x, codes, unit, row_sums, levels, rows, bits, activations, bias):
    return x.new_empty(*x.shape[:-1], rows)
