"""The launch table of the Triton backend: how a call is cut into programs, by shape, dtype and processors."""

from typing import NamedTuple

from torch import Tensor

from projecta.scan.triton.steps import SLAB


class Plan(NamedTuple):
    """How a call is cut into programs."""

    times: bool  # lanes run along time, not along states
    parts: int  # otherwise: number of chunks of time
    chunk: int  # slabs per chunk


PROGRAMS_PER_PROCESSOR = 3  # programs that a processor holds at a time


PARTS, SHORTEST = 64, 8  # maximum chunks; minimum slabs per chunk


SHORT = 32  # slabs up to which lanes along time, of which each has two, are half idle


LONG_CHUNK = 40  # slabs per chunk from which on chunks beat lanes along time, if u is float32


CHANNELS_TO_FILL = 4  # channels per processor from which on lanes along time fill it


REGISTERS, FEWER_REGISTERS = 168, 128  # per thread: 12 warps per processor, or 16


WARPS = 4  # of a program that reads B and C through shared memory


def plan(
    b: int, d: int, l: int, n: int, groups: int, packed: bool, saves: bool, wide: bool, along: bool,
    processors: int,
) -> Plan:  # fmt: skip
    """Choose the number of chunks of time that fill the GPU's processors once, or lanes along time.

    `saves`: a backward pass will follow. `wide`: u is float32. `along`: time is last in memory.
    Measured on an H100 (132 processors).
    """
    slabs = -(-l // SLAB)
    whole = Plan(False, 1, slabs)
    programs = b * groups * -(-(d // groups) * lanes_of(n) // (32 * WARPS))
    fill = PROGRAMS_PER_PROCESSOR * processors // programs
    short = not saves and slabs <= SHORT and programs >= processors
    if packed or fill < 2 or short:
        return whole
    parts = min(fill, PARTS, slabs // SHORTEST)
    if not saves and n <= 32:
        many = b * d >= CHANNELS_TO_FILL * processors or parts < 2
        if along and many and (not wide or slabs < LONG_CHUNK * fill):
            return Plan(True, 1, slabs)
        if fill == 2 and (wide or not along):  # scanning the first half twice costs what two chunks gain
            return whole
    if parts < 2:
        return whole
    chunk = -(-slabs // (parts * 4)) * 4
    return Plan(False, -(-slabs // chunk), chunk)


def lanes_of(n: int) -> int:
    """Lanes that share a channel's states."""
    return 4 if n <= 32 else 8


def padded_states(n: int) -> int:
    return -(-n // lanes_of(n)) * lanes_of(n)


def rows_saved(u: Tensor, packed: bool, sequences: int, every: int) -> int:
    """Number of saved states of a channel, one per `every` steps; each packed sequence begins a row."""
    return u.shape[2] // every + sequences if packed else u.shape[0] * -(-u.shape[2] // every)
