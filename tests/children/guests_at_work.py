# SPDX-License-Identifier: Apache-2.0
"""What the guests of vmms.py do."""

from __future__ import annotations

from tests.children.code import Code
from tests.children.guest import FREE

#: Where more memory lies, and where doorbells and nothing else are.
FREE_GPA = 0x40000000
BELL = 0x60000000

DONE = Code("""
    done
""")
COUNT = Code(f"""
1:  movl $20000, %ecx
2:  incq {FREE:#x}
    decl %ecx
    jnz 2b
    outb %al, $0x70
    jmp 1b
""")
#: RBX: memory, RCX: pages of it; RDX: a doorbell, or not.
FAULTS = Code("""
1:  movq %rbx, %rdi
    movq %rcx, %rsi
2:  incq (%rdi)
    addq $4096, %rdi
    testq $63, %rsi
    jnz 3f
    movl %eax, (%rdx)
3:  decq %rsi
    jnz 2b
    outb %al, $0x70
    jmp 1b
""")
#: RBX: memory, RCX: pages of it, RDX: what the first begins with.
FILL_AND_SUM = Code("""
    movq %rbx, %rdi
    movq %rcx, %rsi
1:  movq %rdx, (%rdi)
    incq %rdx
    addq $4096, %rdi
    decq %rsi
    jnz 1b
    xorl %eax, %eax
    movl $4, %r8d
3:  movq %rbx, %rdi
    movq %rcx, %rsi
    xorl %eax, %eax
2:  addq (%rdi), %rax
    addq $4096, %rdi
    decq %rsi
    jnz 2b
    decl %r8d
    jnz 3b
    say %rax
    done
""")
