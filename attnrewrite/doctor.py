"""What can run on this machine, and why the rest cannot: the data behind ``attnrewrite doctor``.

Each answer is tested, not looked up: a backend of ``scaled_dot_product_attention`` is called once on a small input, a
package is imported, and the compiler is searched for as Inductor does.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import io
import json
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["Check", "Diagnosis", "KernelCheck", "diagnose", "print_diagnosis"]

_OLDEST_TORCH = (2, 11)

# The distribution's name, and the module that it installs.
_KERNEL_PACKAGES = {
    "flash-attn": "flash_attn",
    "flash-attn-4": "flash_attn.cute",
    "sageattention": "sageattention",
    "xformers": "xformers.ops",
    "torch-npu": "torch_npu",
}
_SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CUDA_ONLY = ("cudnn", "efficient")

PACKAGES_NOTE = (
    "Request kernels of these packages by name: options={'kernels': ...} or attnrewrite.attention_backend(...). Exact "
    "ones are also chosen where they were measured to be the fastest (docs/kernels.md)."
)


@dataclass(frozen=True)
class Check:
    """The check of one component: whether it can be used, and what was found or is missing."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class KernelCheck(Check):
    """A kernel. ``package``: the package that it belongs to, "" for PyTorch; ``how_to_get``: a command or a page."""

    package: str = ""
    how_to_get: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that ``attnrewrite doctor`` found."""

    system: tuple[Check, ...]
    devices: tuple[Check, ...]
    compilers: tuple[Check, ...]
    kernels: tuple[KernelCheck, ...]
    sdpa_backends: tuple[Check, ...]
    packages: tuple[Check, ...]
    known_wrong: tuple[Check, ...] = ()
    packages_note: str = PACKAGES_NOTE

    @property
    def healthy(self) -> bool:
        """Whether a model can be compiled here with the default settings."""
        return all(check.ok for check in (*self.system, *self.compilers)) and any(k.ok for k in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """The whole diagnosis as JSON-ready data."""
        return {"healthy": self.healthy, **dataclasses.asdict(self)}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_text(self, width: int = 120) -> str:
        """The text that a terminal shows, without colors."""
        out = io.StringIO()
        print_diagnosis(self, Console(file=out, width=width, color_system=None, force_terminal=False))
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n")) + "\n"

    def __str__(self) -> str:
        return self.to_text()


def diagnose() -> Diagnosis:
    """Checks this machine. Takes a few seconds if optional kernel packages are installed, since it imports them."""
    return Diagnosis(
        system=tuple(_system()),
        devices=tuple(_devices()),
        compilers=tuple(_compilers()),
        kernels=tuple(_kernels()),
        sdpa_backends=tuple(_sdpa_backends()),
        packages=tuple(_package(name, module) for name, module in _KERNEL_PACKAGES.items()),
        known_wrong=tuple(_known_wrong()),
    )


def print_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Prints the diagnosis to a terminal, in color if the terminal supports it."""
    sections = [
        ("Python and PyTorch", diagnosis.system, ""),
        ("Devices", diagnosis.devices, ""),
        ("Inner compiler", diagnosis.compilers, ""),
        ("Kernels of PyTorch", tuple(kernel for kernel in diagnosis.kernels if not kernel.package), ""),
        ("Backends of PyTorch's scaled_dot_product_attention", diagnosis.sdpa_backends, ""),
        ("Kernels of other packages", tuple(_by_package(diagnosis.kernels)), diagnosis.packages_note),
    ]
    if diagnosis.known_wrong:
        sections.append(("Known to be wrong in these versions, and how it is kept out", diagnosis.known_wrong, ""))
    (console or Console()).print(Group(*(_section(title, checks, note) for title, checks, note in sections)))


def _by_package(kernels: tuple[KernelCheck, ...]) -> Iterator[Check]:
    """A line for each kernel that can run, then one for each package that other kernels need."""
    others = [kernel for kernel in kernels if kernel.package]
    yield from (kernel for kernel in others if kernel.ok)
    waiting: dict[tuple[str, str], list[KernelCheck]] = {}
    for kernel in others:
        if not kernel.ok:
            # Kernels of one package with different ways to get them share a line.
            reason = kernel.detail.removesuffix(f" ({kernel.how_to_get})")
            waiting.setdefault((kernel.package, reason), []).append(kernel)
    for (package, reason), group in waiting.items():
        what = reason.removeprefix("the package ").removeprefix(f"{package} ").removeprefix("is ")
        names = ", ".join(kernel.name for kernel in group)
        ways = dict.fromkeys(kernel.how_to_get for kernel in group)
        yield Check(package, False, f"{what}: {names} ({'; or '.join(ways)})")


def _section(title: str, checks: tuple[Check, ...], note: str) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=3)
    grid.add_column(overflow="fold", min_width=16)
    grid.add_column(overflow="fold")
    for check in checks:
        # Text objects: a loader's message may contain what rich would read as markup.
        mark = Text("yes", style="green") if check.ok else Text("no", style="yellow")
        grid.add_row(mark, Text(check.name), Text(check.detail))
    parts: list[RenderableType] = [Text(title, style="bold")]
    if note:
        parts.append(Text(note, style="dim"))
    return Group(*parts, grid, Text())


def _system() -> Iterator[Check]:
    version = platform.python_version()
    yield Check("Python", tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 10), version)
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    oldest = ".".join(map(str, _OLDEST_TORCH))
    supported = release >= _OLDEST_TORCH
    says = "supported" if supported else f"too old: attnrewrite needs torch {oldest} or later; pip install -U torch"
    yield Check("torch", supported, f"{torch.__version__}, {says}")


def _devices() -> Iterator[Check]:
    yield Check("cpu", True, f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            detail = f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}, {memory:.0f} GiB"
            yield Check(f"cuda:{index}", True, detail)
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        yield Check(accelerator.type, True, f"{torch.accelerator.device_count()} found")
    elif torch.version.cuda or torch.version.hip:
        yield Check("cuda", False, "this build of torch supports CUDA or ROCm, but found no driver or no device")
    else:
        yield Check("cuda", False, "this build of torch is for the CPU only")


def _compilers() -> Iterator[Check]:
    from attnrewrite.torch_private import cpp_compiler, has_triton, has_triton_package

    try:
        yield Check("inductor on cpu", True, f"C++ compiler {cpp_compiler()}")
    except (RuntimeError, OSError) as error:
        advice = 'install g++ or clang++, name one in CXX, or use options={"inner_backend": "aot_eager"}'
        yield Check("inductor on cpu", False, f"no C++ compiler: {advice} ({_first_line(error)})")
    if not torch.cuda.is_available():
        return
    if has_triton():
        yield Check("inductor on cuda", True, f"triton {importlib.metadata.version('triton')}")
    elif has_triton_package():
        yield Check("inductor on cuda", False, "triton is installed, but does not support this device")
    else:
        yield Check("inductor on cuda", False, "triton is not installed: pip install triton")


def _kernels() -> Iterator[KernelCheck]:
    from attnrewrite.kernels import registered_kernels

    for kernel in registered_kernels():
        found = kernel.availability()
        name, how = "", kernel.needs
        vendor = kernel.vendor
        if vendor is not None and vendor.package.distribution != "torch":
            name, how = vendor.package.distribution, vendor.package.how_to_get
        yield KernelCheck(kernel.name, found.available, found.detail, name, how)


def _known_wrong() -> Iterator[Check]:
    """The defects of the kernels that can run here. Each is kept out, so that none is in the way."""
    from attnrewrite.kernels import kernel_named
    from attnrewrite.kernels.known_wrong import KNOWN_WRONG

    for entry in KNOWN_WRONG:
        if torch.cuda.is_available() and kernel_named(entry.kernel).availability().available and entry.is_here():
            seen = f"seen with {entry.seen}" if entry.seen else "reported"
            yield Check(entry.kernel, True, f"{entry.what}: {entry.kept_out} ({seen}; {entry.source})")


def _sdpa_backends() -> Iterator[Check]:
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices.append(accelerator.type)
    for device in devices:
        # The fused kernels of a GPU need half precision; those of a CPU take float32.
        dtype = torch.float32 if device == "cpu" else torch.float16
        for name, backend in _SDPA_BACKENDS.items():
            yield _try_sdpa(name, backend, device, dtype)


def _try_sdpa(name: str, backend: SDPBackend, device: str, dtype: torch.dtype) -> Check:
    """Calls a single backend; if it refuses, torch says why in warnings."""
    kind = f"{name} on {device}"
    if device == "cpu" and name in _CUDA_ONLY:
        return Check(kind, False, "exists only for CUDA devices")
    query = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad(), sdpa_kernel(backend):
        warnings.simplefilter("always")
        try:
            scaled_dot_product_attention(query, query, query)
        except (RuntimeError, NotImplementedError) as error:
            # The first lines of a warning name its place in torch's source; "because" comes with the last ones.
            reasons = [_first_line(str(w.message).split("(Triggered internally")[0]) for w in caught]
            return Check(kind, False, "; ".join(dict.fromkeys(reasons)) or _first_line(error))
    return Check(kind, True, f"ran in {str(dtype).removeprefix('torch.')}")


def _package(distribution: str, module: str) -> Check:
    """Whether a kernel package is installed and can be imported."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Check(distribution, False, "not installed")
    try:
        importlib.import_module(module)
    # A package built for another torch or CUDA fails in many ways when it loads: a missing symbol is an ImportError, a
    # missing library an OSError, a driver that is not there a RuntimeError, and so on.
    except (ImportError, OSError, RuntimeError, AttributeError, AssertionError, TypeError, ValueError) as error:
        return Check(distribution, False, f"{version} is installed but does not load: {_first_line(error)}")
    return Check(distribution, True, f"{version} is installed")


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    return text or type(error).__name__
