"""Compile the Triton kernels for GPUs that are not here; a JSON line for each says what came out.

    python tests/kernels/compile_only.py 90           every kernel, for a compute capability
    python tests/kernels/compile_only.py 90 --trap    one kernel with a known compiler trap put back in

Runs in a process of its own: TRITON_INTERPRET must not be set. ptxas and the disassembler come with triton.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns without

import triton
from marith_kernels import triton_combine, triton_decoding, triton_lse, triton_program
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FIXED = (
    "x_stride",
    "extra_stride",
    "target_stride",
    "draft_stride",
    "out_stride",
    "V",
)  # by the model, and divisible by 16
ROWS = ("x_ptr", "target_ptr", "draft_ptr")
INTEGERS = {
    "code_ptr": "*i32",
    "argmax_ptr": "*i32",
    "counter_ptr": "*i32",
    "start_ptr": "*i32",
    "best_ptr": "*i64",
    "token_ptr": "*i64",
    "accepted_ptr": "*i64",
}


class Variant(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    dtype: str  # of the rows
    warps: int = 4
    divisible: bool = True  # the vocabulary by 16


def variants() -> Iterator[Variant]:
    for dtype in ("*fp32", "*bf16"):
        yield Variant(f"lse {dtype}", triton_lse.lse_kernel, {"BLOCK": 4096, "BLOCKS": 64}, dtype)
        for terms in (1, 2, 4, 8):
            constants = {"BLOCK": 2048, "BLOCKS": 128, "TERMS": terms}
            yield Variant(f"linear {terms} {dtype}", triton_combine.combine_linear, constants, dtype)
        for slots in triton_combine.SLOTS:
            for divide in (False, True):
                yield program(slots, divide, dtype)
        for slots in triton_combine.EXTENDED_SLOTS:
            for divide in (False, True):
                yield program(slots, divide, dtype, extended=True)
    yield program(2, False, "*bf16")._replace(name="program 2 *bf16 odd vocabulary", divisible=False)
    constants = {"BLOCK": 4096, "BLOCKS": 64, "TEMPERED": True}
    yield Variant("sample *fp32", triton_decoding.sample_kernel, constants, "*fp32", 8)
    yield Variant("residual *fp32", triton_decoding.residual_kernel, constants, "*fp32", 8)
    yield Variant("statistics *fp32", triton_decoding.statistics_kernel, {**constants, "MISSING": 1}, "*fp32")
    yield Variant(
        "accept *fp32", triton_decoding.accept_kernel, {"POSITIONS": 8, "TEMPERED": True}, "*fp32", 1
    )


def program(
    slots: int, divide: bool, dtype: str, extended: bool = False, module: Any = triton_combine
) -> Variant:
    block = module.block_size(slots, divide)
    constants = {"BLOCK": block, "BLOCKS": 128, "SLOTS": slots, "DIVIDE": divide, "EXTENDED": extended}
    name = f"{'extended' if extended else 'program'} {slots}{' divide' if divide else ''} {dtype}"
    return Variant(name, module.combine_program, constants, dtype)


def with_the_trap() -> Iterator[Variant]:
    """`combine_program` where saved slots begin as another name for the top slot."""
    source = Path(triton_program.__file__).read_text()
    innocent = "saved = saved + (tl.zeros([BLOCK], tl.float32),)"
    assert innocent in source
    with tempfile.TemporaryDirectory() as folder:
        trapped = load(Path(folder) / "triton_trap.py", source.replace(innocent, "saved = saved + (energy,)"))
        calling = Path(triton_combine.__file__).read_text()
        assert ".triton_program import" in calling
        calling = calling.replace(".triton_program import", f".{trapped.__name__.split('.')[1]} import")
        yield program(3, False, "*bf16", module=load(Path(folder) / "triton_calls_trap.py", calling))


def load(path: Path, source: str) -> Any:
    """A module of the package from this source."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"marith_kernels.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compile_variant(variant: Variant, capability: int) -> Any:
    kernel, constants = variant.kernel, variant.constants
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = variant.dtype if name in ROWS else INTEGERS.get(name, "*fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name == "uniform":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name in FIXED and (variant.divisible or name != "V"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": variant.warps})


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def carried_tensors(ttir: str) -> list[int]:
    """For each loop of the program in the TTIR: how many tensors it carries from round to round."""
    return [types.count("tensor<") for types in re.findall(r"scf\.for .*?->\s*\((.*?)\)", ttir)]


def run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def report(name: str, compiled: Any, capability: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return {
        "kernel": name,
        "capability": capability,
        "registers": registers,
        "stack": stack,
        "local": local,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads": len(re.findall(r"\bLDG\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E[.\w]*\.128", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E[.\w]*\.128", sass)),
        "carried": carried_tensors(compiled.asm["ttir"]),
    }


def main() -> None:
    capability = int(sys.argv[1])
    for variant in with_the_trap() if "--trap" in sys.argv else variants():
        print(json.dumps(report(variant.name, compile_variant(variant, capability), capability)), flush=True)


if __name__ == "__main__":
    main()
