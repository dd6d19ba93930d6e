"""The loops over logits and scores are vectors in each instruction set that they are compiled for, not only
in that of the machine they were written on."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mem1_core
from mem1_core import _library

# What is compiled into the package.
LIBRARIES = next(Path(mem1_core.__file__).parent.glob("lib/libmem1_core.so*")), Path(_library._C.__file__)
CLONES = {"avx2": "ymm", "avx512f": "zmm"}  # of csrc/common/clones.h, and the registers of each
# Functions whose time shows, by the beginning of what objdump calls them; those of doubles need not be fast.
LOOPS = (
    "ppo_loss::(anonymous namespace)::highest(float",
    "ppo_loss::(anonymous namespace)::sums(float",
    "ppo_loss::(anonymous namespace)::gradient(float",
    "cpu::column_max(float",
    "cpu::exponentials(float const*, long, long, float, float const*, float*, float*)",
    "cpu::exponentials(float const*, long, long, float, float const*, float*, c10::BFloat16*)",
    "cpu::gradients(float const*, float const*, long, long, float, bool, float const*, float const*, float*",
    "cpu::gradients(float const*, float const*, long, long, float, bool, float const*, float const*, c10",
    "cpu::(anonymous namespace)::attend<float>",
    "cpu::(anonymous namespace)::attend<c10::BFloat16>",
)
# What such a loop does with each element. Not sums: they are also made of what scalars have found.
ARITHMETIC = re.compile(r"\sv(?:mul|max|cmp\w*|fn?m(?:add|sub)\d+)ps .*%([yz]mm)")

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils"),
]


def functions() -> Iterator[tuple[str, str]]:
    """Name and instructions of each function that is compiled into the package."""
    for library in LIBRARIES:
        command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(library)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for function in re.split(r"\n\n", text):
            head, _, body = function.partition("\n")
            name = re.match(r"[0-9a-f]+ <(.*)>:$", head)
            if name is not None:
                yield name[1], body


@cache
def clones() -> dict[tuple[str, str], str]:
    """Instructions of each loop, by its name and instruction set: those that the compiler has cloned, and
    templates of a vector's width, which have the set in their own name.
    """
    found = {}
    for name, body in functions():
        if told := re.fullmatch(r"mem1::(.*) \[clone \.(\w+)\]", name):
            found[told[1], told[2]] = body
        elif told := re.fullmatch(r"void mem1::(.*)_(avx2|avx512)(<[^[]*)", name):
            found[told[1] + told[3], told[2].replace("avx512", "avx512f")] = body
    return found


def compiled(loop: str, instructions: str) -> str:
    # As compilers sign their work. Templates of a vector's width it compiles for each set, as GCC does.
    if "attend<" not in loop and b"clang version" in LIBRARIES[0].read_bytes():
        pytest.skip("clang, for which clones.h makes one version of each function")
    (body,) = (
        body for (name, made), body in clones().items() if name.startswith(loop) and made == instructions
    )
    return body


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("instructions", CLONES)
def test_a_loop_is_made_of_vectors(loop: str, instructions: str) -> None:
    body = compiled(loop, instructions)
    assert CLONES[instructions] in ARITHMETIC.findall(body)


@pytest.mark.parametrize("loop", [loop for loop in LOOPS if "attend<" in loop])
@pytest.mark.parametrize("instructions", CLONES)
def test_sums_of_products_stay_in_registers(loop: str, instructions: str) -> None:
    """Vectors wider than those of the instruction set go to memory after each step: five times slower."""
    lines = compiled(loop, instructions).splitlines()
    at = {line.split(":")[0].strip(): n for n, line in enumerate(lines)}
    jumps = [(at.get(told[1], n), n) for n, x in enumerate(lines) if (told := re.search(r"\sj\w+ +(\w+)", x))]
    back = [(to, n) for to, n in jumps if to < n]
    innermost = [(a, b) for a, b in back if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in back)]
    loops = ["\n".join(lines[a : b + 1]) for a, b in innermost]
    # Not that of a soft cap, which divides and writes each score.
    products = [
        text for text in loops if len(re.findall(r"\svfmadd\w+ps ", text)) >= 4 and "vdivps" not in text
    ]
    assert len(products) >= 4, "keys and values, of two heads and of one"
    assert not [text for text in products if re.search(r"\svmov\w+ +%[xyz]mm\d+,.*\(", text)]
