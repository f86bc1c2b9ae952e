"""Sizes, grids, options and buffers of a call of the Triton backend, and its compiled launches."""

from torch import Tensor

from projecta._checks import fail
from projecta._triton.launch import new_buffer, ordered_strides, processors_of, start_kernel
from projecta.scan._operator import Inputs
from projecta.scan.triton import pack_and_step
from projecta.scan.triton.plan import (
    FEWER_REGISTERS,
    REGISTERS,
    WARPS,
    lanes_of,
    padded_states,
    plan,
    rows_saved,
)
from projecta.scan.triton.steps import SLAB


class Layout:
    """Sizes, plan and launches of all calls whose tensors differ in values only."""

    def __init__(
        self, inputs: Inputs, delta_softplus: bool, saved: Tensor, with_output: bool = True,
        log_A: bool = False, reverse: bool = False,
    ):  # fmt: skip
        u, _, A, B, C = inputs[:5]
        self.way = -1 if reverse else 1  # of the scan through memory
        self.b, self.d, self.l = u.shape
        self.n = A.shape[1]
        self.g = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        self.packed = inputs.cu_seqlens is not None
        self.sequences = self.b if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
        self.slabs = -(-self.l // SLAB)
        self.processors = processors_of(u.device)
        self.size = u.element_size()
        self.least = min(t.element_size() for t in (u, inputs.delta, inputs.z) if t is not None)
        self.plan = plan(
            self.sequences, self.d, self.l, self.n, self.g, self.packed, saved.numel() > 0, self.size == 4,
            all(t.stride(2) == 1 for t in (u, inputs.delta, inputs.z) if t is not None), self.processors,
        )  # fmt: skip
        self.padded = padded_states(self.n)
        self.lanes = lanes_of(self.n)
        self.warps = WARPS if self.n <= 64 else 1  # per program: their sums go through shared memory
        self.width = 32 * self.warps // self.lanes  # channels per program
        # slabs per block of the loops over time: 16 bytes of an array for each lane
        self.unroll = 1 if self.n > 32 else 8 // self.size
        self.flags = {
            "SOFTPLUS": delta_softplus,
            "LOG_A": log_A,
            "STEADY_B": B.dim() == 2,
            "STEADY_C": C.dim() == 2,
        }
        # `forward_times` reads 16-bit B and C without packing if it can read whole words
        self.native = all(t.dim() == 2 or (t.element_size() == 2 and self.words(t)) for t in (B, C))
        self.states = saved.numel()  # floats of the saved states; the output before the gate may follow
        self.with_output = with_output and inputs.z is not None
        if self.states and self.with_output:
            self.states -= words_of(u)
        rows = self.states // (self.padded * self.d)
        for self.every in (1, 2, 4):  # slabs between saved states; equal numbers of rows have equal layouts
            if not self.states or rows == rows_saved(u, self.packed, self.sequences, SLAB * self.every):
                break
        else:
            fail("scan_triton", "every", "be 8, 16 or 32", f"{rows} rows of states")
        self.launches: dict = {}

    def along_time(self) -> tuple:
        """Grid, sizes and options of the kernel whose lanes run along time."""
        grid, sizes = self.cut(1, 1)
        few = sizes["count"] <= 12 * self.processors
        options = self.flags | {
            "WHOLE": not self.packed and self.l % (2 * SLAB * 32) == 0, "NATIVE": self.way * self.native,
            "PIN": not self.native or not few or self.l > 2048, "num_warps": 1,
            "maxnreg": REGISTERS if few or self.size == 4 else FEWER_REGISTERS,
        }  # fmt: skip
        return grid, sizes, options

    def over_states(self, block: int, chunks: int, links: int) -> tuple:
        """The same of a kernel over states, for `chunks` chunks of time and blocks of `block` slabs.

        links: chunks of a sequence that pass on a state.
        """
        grid, sizes = self.cut(self.width, chunks)
        sizes["links"] = links
        whole = not self.packed and self.l % (SLAB * block) == 0 and self.d // self.g % self.width == 0
        options = self.flags | {
            "LANES": self.lanes, "CHANNELS": 32 // self.lanes, "N": self.padded, "WARPS": self.warps,
            "WHOLE": whole, "num_warps": self.warps, "maxnreg": REGISTERS,
        }  # fmt: skip
        return grid, sizes, options

    def cut(self, width: int, parts: int) -> tuple[tuple[int, ...], dict[str, int]]:
        """Grid and sizes of programs of `width` channels, with `parts` chunks of time."""
        per_group, tiles = self.d // self.g, self.tiles(width)
        count = self.sequences * parts * self.g * tiles
        processors = min(self.processors, count)
        sizes = {
            "d": self.d, "l": self.l, "n": self.n, "per_group": per_group, "tiles": tiles,
            "slabs": self.slabs, "chunk": self.plan.chunk, "groups": self.g, "count": count, "parts": parts,
            "processors": processors,
        }  # fmt: skip
        return (-(-count // processors) * processors,), sizes

    def tiles(self, width: int) -> int:
        """Number of programs of `width` channels per group."""
        return -(-(self.d // self.g) // width)

    def strides(self, **tensors: Tensor | None) -> dict[str, int]:
        """Strides over (b, d, l) in the order of the scan."""
        return ordered_strides(self.way, **tensors)

    def weight_strides(self, axes: str = "bgnl", **tensors: Tensor) -> dict[str, int]:
        """Strides over these axes of B or C (b, g, n, l) in the order of the scan; else 0."""
        return {
            name + axis: t.stride(i) * (self.way if axis == "l" else 1) if t.dim() == 4 else 0
            for name, t in tensors.items()
            for i, axis in enumerate(axes)
        }

    def wide(self, block: int, *tensors: Tensor | None) -> int:
        """The kernels' flag WIDE for blocks of so many slabs."""
        enough = SLAB * block // self.lanes * self.least >= 4
        return self.way if enough and self.words(*tensors) else 0

    def words(self, *tensors: Tensor | None) -> bool:
        """Whether all of them can be read 16 bytes at a time."""
        if self.l % 8 or self.packed:
            return False
        for t in tensors:
            if t is not None:
                *outer, along = t.stride()
                if along != 1 or t.data_ptr() % 16 or any(s % 8 for s in outer):
                    return False
        return True

    def rows_of(self, lanes: int) -> tuple[int, int, int]:
        """Slabs, rows and steps of packed B and C, for `lanes` lanes along time or 0."""
        return (-(-self.l // (16 * lanes)), self.n, 16 * lanes) if lanes else (self.slabs, self.padded, SLAB)

    def arranged(self, B: Tensor, C: Tensor, lanes: int = 0) -> tuple[Tensor, Tensor]:
        """B and C packed for the kernels; constant ones in float32."""
        slabs, rows, steps = self.rows_of(lanes)
        varying = B.dim() == 4, C.dim() == 4
        each = self.b * self.g * slabs * rows * steps
        buffer, offsets = (
            new_buffer(B, each * sum(varying)),
            (0, varying[0] * (each if lanes else rows * steps)),
        )
        outs = [
            buffer[offset:] if varies else t.float().contiguous()
            for offset, t, varies in zip(offsets, (B, C), varying, strict=True)
        ]

        def describe():
            block = 128
            strides = self.weight_strides(B=B, C=C)
            sizes = {"l": self.l, "n": self.n, "groups": self.g, "slabs": slabs}
            sizes["blocks"] = -(-slabs * steps // block)
            along = [t.stride(3) * self.way for t, varies in zip((B, C), varying, strict=True) if varies]
            options = {"N": self.padded, "LANES": lanes, "BLOCK": block, "UNIT": set(along) == {1}}
            return (sizes["blocks"] * self.b * self.g, -(-rows // 16)), strides | sizes, options

        if any(varying):
            tensors = {"B": B if varying[0] else None, "C": C if varying[1] else None}
            tensors |= {"to_B": outs[0], "to_C": outs[1]}
            start_kernel(self.launches, pack_and_step.pack_weights, tensors, describe)
        return outs[0], outs[1]

    def links(self, link: object) -> int:
        """Chunks of a sequence that pass on a state; with a `Link` the last one does, too."""
        return self.plan.parts - (link is None)

    def carried(self, u: Tensor, links: int) -> tuple[Tensor | None, Tensor | None]:
        """Buffers for the values that `links` chunks pass on: a state, and its sum of delta."""
        if self.plan.parts == 1:
            return None, None
        size = self.b * links * self.d
        return new_buffer(u, size * self.padded), new_buffer(u, size)

    def kept(self, saved: Tensor, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The parts of `saved`: states (row, n, channel), and the output before the gate."""
        if not self.states:
            return None, None
        if not self.with_output:
            return saved, None
        return saved[: self.states], saved[self.states :].view(u.dtype)[: u.numel()]


def words_of(u: Tensor) -> int:
    """Size of u in float32 numbers, rounded up for loads of 16 bytes."""
    return -(-u.numel() * u.element_size() // 16) * 4
