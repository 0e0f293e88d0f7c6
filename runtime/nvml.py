"""What NVML knows of GPUs and their links, through ctypes: the driver brings the library, no package is needed.

https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_NVLINK = 2
"""NVML_P2P_CAPS_INDEX_NVLINK"""
_LINKS = 18
"""NVML_NVLINK_MAX_LINKS"""


@cache
def _library() -> Any:
    """The library, initialised; None without a driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def driver_version() -> str | None:
    """The driver's version; None without one."""
    library, text = _library(), ctypes.create_string_buffer(80)
    if library is None or library.nvmlSystemGetDriverVersion(text, len(text)):
        return None
    return text.value.decode()


def count() -> int:
    """How many GPUs the driver has, whatever this process may see of them."""
    library, number = _library(), ctypes.c_uint()
    return 0 if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(number)) else int(number.value)


def nvlinks(bus: str) -> int | None:
    """How many NVLinks of the GPU at a PCI address are up; None if NVML does not say."""
    library, device = _library(), _device(bus)
    if device is None:
        return None
    up, state = 0, ctypes.c_uint()
    for link in range(_LINKS):
        if library.nvmlDeviceGetNvLinkState(device, ctypes.c_uint(link), ctypes.byref(state)) == 0:
            up += state.value == 1
    return up


def over_nvlink(bus: str, other: str) -> bool | None:
    """Whether two GPUs reach each other over NVLink; None if NVML does not say."""
    library, first, second = _library(), _device(bus), _device(other)
    status = ctypes.c_uint()
    if first is None or second is None:
        return None
    if library.nvmlDeviceGetP2PStatus(first, second, ctypes.c_uint(_NVLINK), ctypes.byref(status)):
        return None
    return status.value == 0


def _device(bus: str) -> ctypes.c_void_p | None:
    library, handle = _library(), ctypes.c_void_p()
    if library is None or library.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(handle)):
        return None
    return handle
