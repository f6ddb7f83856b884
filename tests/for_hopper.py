"""Compile every Triton kernel for a Hopper GPU, down to machine code, where there is none.

A program of its own, because the interpreter that the other tests run in replaces the compiler.
"""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from llama4_lab import packed_triton
from llama4_lab.experts import triton_kernels as kernels
from llama4_lab.model import flash_decode

SIZES = {"N", "M", "K", "OUT", "WIDTH", "E", "D", "SIZE", "per_token", "COUNT", "PARTS"}
CODES = {
    "plain": ("*bf16", "*bf16", 64),
    "int8": ("*i8", "*bf16", 128),
    "int4": ("*u8", "*bf16", 128),
    "fp8": ("*fp8e4nv", "*fp32", 64),
}
FLOATS = {"score", "cos", "sin", "temperature", "part", "peak", "total", "squares", "x_squares"}


def build(kernel, kind="plain", warps=4, capability=90, **constants):
    codes, scales, group = CODES[kind]
    constants = {"KIND": kind, "GROUP": group, **constants}
    types = {}
    for name in kernel.arg_names:
        types[name] = (
            "constexpr" if name in constants
            else codes if name == "codes"
            else scales if name == "scales"
            else "*i64" if name in ("order", "offsets", "place")
            else "fp32" if name == "eps"
            else "i32" if name in SIZES
            else "*fp32" if name in FLOATS
            else "*bf16"
        )  # fmt: skip
    names = list(types)
    values = {(names.index(x),): y for x, y in constants.items() if x in types}
    whole = {"K", "OUT", "WIDTH", "D", "SIZE"}  # multiples of 16, as in every released model
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind_of) in enumerate(types.items())
        if kind_of.startswith("*") or name in whole
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert built.asm["cubin"]
    return built.asm["ptx"]


norm = {"IS_NORMED": True, "BLOCK_P": 256}
for kind in CODES:
    cut = {"SPLIT": 4, "EVEN": True, "ROWS": 16}
    block = cut | {"TOPK": 1, "BLOCK_E": 16}
    ending = {"HAS_RESIDUAL": True, "HAS_GAIN": True}
    for tile in 1, 8:
        ptx = build(kernels.linear, kind, TILE=tile, OVERLAPS=True, **norm, **ending, **cut)
        assert "griddepcontrol.wait" in ptx, "kernels of a step do not overlap"
        ptx = build(kernels.gate_up, kind, TILE=tile, OVERLAPS=True, **norm, **block)
        if tile == 8:  # of one token, inputs are copied in smaller units
            assert "cp.async.cg" in ptx, "weights are not loaded ahead"
            assert "cp.async.ca" not in ptx, "weights are not read in units of 16 bytes"
        assert "mma.sync" in ptx, "weights are not multiplied by tensor cores"
        build(kernels.down, kind, TILE=tile, OVERLAPS=True, **block)
    whole = {"SPLIT": 1, "EVEN": True, "ROWS": 64, "TILE": 64}
    assert "wgmma" in build(kernels.linear, kind, OVERLAPS=True, **norm, **ending, **whole)
    for kernel in kernels.gate_up_tiles, kernels.down_tiles:
        build(kernel, kind, BLOCK_E=16, TILE=8, **cut)
        assert "wgmma" in build(kernel, kind, BLOCK_E=16, **whole)
# Ampere has no overlap and no wgmma, and takes the rest.
build(kernels.linear, "int4", capability=80, TILE=1, OVERLAPS=False, **norm, **ending, **cut)
build(kernels.narrow, BLOCK=8192, OVERLAPS=True, warps=8, **norm)
build(kernels.half_norm, warps=8, SLOTS=2, HAS_RESIDUAL=True, BLOCK=8192, OVERLAPS=True)
for kind in "int4", "int8":
    build(packed_triton.unpack_groups, kind, IS_INT4=kind == "int4", GROUPS=64)
build(kernels.sort_logits, warps=8, TOPK=1, BLOCK_M=128, BLOCK_E=32, OVERLAPS=True, **norm)
shape = {"GROUP": 5, "DH": 128, "PARTS": 32, "OVERLAPS": True}
for rotates in True, False:
    rule = {"ROTATES": rotates, "NORMS": rotates, "HEADS": 8, "BLOCK": 16, "KEYS": 64}
    build(flash_decode._attend_part, **rule, **shape)
build(flash_decode._join_parts, **shape)
