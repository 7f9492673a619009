# SPDX-License-Identifier: Apache-2.0
# Pieces of code that children of tests/kvm run, found by their names (tests/kvm/lone_child.py). Position independent.
.text
.code64
out_imm8:       outb    %al, $0x80
out_imm32:      outl    %eax, $0x90
out_dx:         outw    %ax, %dx
in_imm8:        inb     $0x71, %al
in_dx32:        inl     %dx, %eax
out_prefixed:   .byte   0x66, 0x48, 0x3e, 0xee          # out dx, al with useless prefixes
out_7e:         outb    %al, $0x7e
rep_outsb:      rep     outsb
outsw:          outsw
                hlt
outsb_out:      outsb
                outb    %al, %dx
                hlt
rep_insw:       rep     insw
insb:           insb
                hlt
load32:         movl    (%rbx), %eax
load_rip:       movq    8(%rip), %rax
store8:         movb    %al, (%rbx)
store32:        movl    %eax, 16(%rbx, %rcx, 4)
store_imm:      movl    $0x11223344, (%rbx)
store64:        movq    %rax, (%rbx)
store_two:      movl    %eax, (%rbx)
                movl    %ecx, (%rbx)
                outb    %al, $0x80
stosl_two:      rep     stosl
                outb    %al, $0x80
read_modify:    addl    %eax, (%rbx)
push_pop:       pushq   %rax
                popq    %rcx
                outb    %al, $0x80
call_:          call    *%rbx
ret_:           ret
movs:           rep     movsb
                outb    %al, $0x80
stos:           rep     stosq
sse_store:      movups  %xmm0, (%rbx)
bt_far:         btsq    %rcx, (%rbx)
xchg_:          xchgl   %eax, (%rbx)
fs_load:        movl    %fs:(%rbx), %eax
int3_:          int3
                outb    %al, $0x80
int80:          int     $0x80
ud2_:           ud2
load_ds:        movw    %ax, %ds
                outb    %al, $0x80
iret_:          iretq
rdmsr_:         rdmsr
                outb    %al, $0x80
wrmsr_:         wrmsr
                outb    %al, $0x80
cpuid_:         cpuid
                outb    %al, $0x80
hlt_:           hlt
                outb    %al, $0x80
sti_hlt:        sti
                hlt
                outb    %al, $0x80
spin:           pause
                jmp     spin
count:          incq    %rcx
                jmp     count
call_page:      call    *%rbx
                outb    %al, $0x80
icebp:          .byte   0xf1
                outb    %al, $0x80
popf_step:      pushq   $0x102
                popfq
                nop
                nop
.code32
load32_32:      movl    0x10(%ebx), %eax
push32:         pushl   %eax
.code16
real_out:       outb    %al, $0x80
real_load:      movw    (%bx), %ax
real_insw:      rep     insw
real_push:      pushw   %ax
real_int:       int     $0x21
end_of_code:
