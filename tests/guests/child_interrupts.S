# SPDX-License-Identifier: Apache-2.0
# A child that takes interrupts (tests/kvm/child.py): counts every vector, and acknowledges it unless told not to.
#
# Flat at CODE; COUNTERS holds 256 u32, KEEP a byte per vector: 1 means no EOI, 2 by the synthetic MSR. The first bytes are the offsets of the
# entry, of the stubs (16 bytes each) and of the pieces.
.set COUNTERS, 0x30000
.set KEEP, 0x31000
.set READY, 0x32000
.set EOI, 0x80b
.text
.code64
head:
        .quad   entry - head
        .quad   stubs - head
        .quad   store_loop - head
        .quad   call_once - head
        .quad   xapic_entry - head
        .quad   write_msr - head
        .quad   read_msr - head

# RDI: VP index. Enables the local APIC in x2APIC mode, opens interrupts and waits.
entry:
        movl    $0x1b, %ecx
        rdmsr
        orl     $0xc00, %eax
        wrmsr
        movl    $0x80f, %ecx
        xorl    %edx, %edx
        movl    $0x1ff, %eax
        wrmsr
ready:
        movl    $1, READY(, %rdi, 4)
wait:
        sti
        hlt
        jmp     wait

# The same with the local APIC as it is after reset, which the root has enabled.
xapic_entry:
        movl    $0xfee000f0, %ebx
        movl    $0x1ff, (%rbx)
        jmp     ready

# RBX: address, RAX: value, RCX: count, RDX: what the value grows by. Then one OUT.
store_loop:
        movl    %eax, (%rbx)
        addl    %edx, %eax
        decq    %rcx
        jnz     store_loop
        outb    %al, $0x80
        jmp     wait

# A hypercall with the page at R9 and the registers as they are, its result to (R10), one OUT.
call_once:
        call    *%r9
        movq    %rax, (%r10)
        outb    %al, $0x80
        jmp     wait

# MSR RCX := EDX:EAX, one OUT; and MSR RCX to (R10), one OUT.
write_msr:
        wrmsr
        outb    %al, $0x80
        jmp     wait
read_msr:
        rdmsr
        movl    %eax, (%r10)
        movl    %edx, 4(%r10)
        outb    %al, $0x80
        jmp     wait

common:
        pushq   %rax
        pushq   %rcx
        pushq   %rdx
        movq    24(%rsp), %rax
        lock incl COUNTERS(, %rax, 4)
        cmpb    $1, KEEP(%rax)
        je      1f
        movl    $0x40000070, %ecx
        cmpb    $2, KEEP(%rax)
        je      3f
        movl    $0x1b, %ecx
        rdmsr
        testl   $0x400, %eax
        jz      2f
        movl    $EOI, %ecx
3:      xorl    %eax, %eax
        xorl    %edx, %edx
        wrmsr
        jmp     1f
2:      movl    $0xfee000b0, %eax
        movl    $0, (%rax)
1:      popq    %rdx
        popq    %rcx
        popq    %rax
        addq    $8, %rsp
        iretq

        .balign 16
stubs:
        .set    vector, 0
        .rept   256
        .balign 16
        pushq   $vector
        jmp     common
        .set    vector, vector + 1
        .endr
        .balign 16
