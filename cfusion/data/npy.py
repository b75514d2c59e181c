"""The header of an `.npy` member, checked without believing what it claims."""

from __future__ import annotations

import io

import numpy as np

from cfusion.data.shard_index import Member


def check_header(header: bytes, member: Member) -> str:
    """What is wrong with an `.npy` header; empty where it says what the index says.

    Args:
        header: The bytes before the array.
        member: The index entry. Its size was compared with its shape, so a header that claims more is a lie.
    """
    stream = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # noqa: BLE001 - numpy reads the text as Python, and raises whatever that leads to
        return f"is not an .npy file ({error})"
    if dtype.hasobject:
        return "holds Python objects, which only unpickling could read; that is never done"
    if fortran or shape != member.shape or dtype != np.dtype(member.dtype):
        order = " in Fortran order" if fortran else ""
        return f"its header claims {dtype.str} {shape}{order}, the index {member.dtype} {member.shape}"
    return ""
