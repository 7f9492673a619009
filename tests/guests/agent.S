// SPDX-License-Identifier: Apache-2.0
/*
 * A bare-metal guest that does what a list of operations says, in ring 0 of a 64-bit processor.
 *
 * The test writes records into the mailbox of a VP and answers its doorbell (a write of the APIC id to port DOORBELL);
 * the guest works until a record of kind 0 and rings again. See tests/kvm/guest.py for the record.
 *
 *	r15  the record at work		r14  this VP's block (counters, TSS, stack)
 *	r13  where an exception continues
 */
#define DOORBELL	0x3D
#define PANIC		0x3E
#define BLOCKS		0x300000	/* 64 KiB per VP: interrupt counters at 0, TSS at 0x1000, stack below 0x4000 */
#define EOI_WORD	0x800		/* in a block: where the VP assist page is, 0 for nowhere; the test writes it */
#define EOIS_LEFT_OUT	0x808
#define MAILBOXES	0x400000	/* 1 MiB per VP */
#define RECORD		192
#define OP_STATUS	4
#define OP_RCX		8
#define OP_RDX		16
#define OP_R8		24
#define OP_RAX		32
#define OP_RBX		40
#define OP_RSI		48
#define OP_RDI		56
#define OP_XMM		64
#define OP_TARGET	160
#define OP_FAULT_RIP	168
#define OP_ERROR	176

	.text
	.code64
	.globl	_start
_start:	/* what the test needs to know */
	.quad	boot
	.quad	stubs
	.quad	trampoline
	.quad	trampoline_end - trampoline

boot:
	movl	$1, %eax
	cpuid
	shrl	$24, %ebx
	movq	%rbx, %r12
	movq	%rbx, %r14
	shlq	$16, %r14
	addq	$BLOCKS, %r14
	leaq	0x4000(%r14), %rsp
	lgdt	0x2F0FF0		/* descriptors that the test wrote */
	lidt	0x2F2FF0
	movl	%r12d, %eax
	shll	$4, %eax
	addl	$0x30, %eax
	movb	$0x89, 0x2F0005(%rax)	/* not busy: a processor may start again */
	ltr	%ax
	movl	$0x1B, %ecx		/* x2APIC, on */
	rdmsr
	orl	$0xC00, %eax
	wrmsr
	movl	$0x80F, %ecx
	movl	$0x1FF, %eax
	xorl	%edx, %edx
	wrmsr
	xorl	%r13d, %r13d

batch:
	movq	%r12, %rax
	movq	%rax, %r15
	shlq	$20, %r15
	addq	$MAILBOXES, %r15
	outb	%al, $DOORBELL
next:
	movl	(%r15), %eax
	testl	%eax, %eax
	jz	batch
	movl	$0, OP_STATUS(%r15)
	leaq	done(%rip), %r13
	cmpl	$12, %eax
	ja	done
	leaq	table(%rip), %rbx
	jmp	*(%rbx,%rax,8)
done:
	xorl	%r13d, %r13d
	addq	$RECORD, %r15
	jmp	next

	.balign	8
table:	.quad	batch, hypercall, read_msr, write_msr, do_cpuid, hypercall_ring3, hypercall_32, await, read_tsc
	.quad	load, store, triple_fault, hammer

load_registers:
	movups	OP_XMM(%r15), %xmm0
	movups	OP_XMM+16(%r15), %xmm1
	movups	OP_XMM+32(%r15), %xmm2
	movups	OP_XMM+48(%r15), %xmm3
	movups	OP_XMM+64(%r15), %xmm4
	movups	OP_XMM+80(%r15), %xmm5
	movq	OP_RCX(%r15), %rcx
	movq	OP_RDX(%r15), %rdx
	movq	OP_R8(%r15), %r8
	movq	OP_RAX(%r15), %rax
	movq	OP_RBX(%r15), %rbx
	movq	OP_RSI(%r15), %rsi
	movq	OP_RDI(%r15), %rdi
	ret

hypercall:
	call	load_registers
	call	*OP_TARGET(%r15)
	movq	%rax, OP_RAX(%r15)
	movq	%rcx, OP_RCX(%r15)
	movq	%rdx, OP_RDX(%r15)
	movq	%r8, OP_R8(%r15)
	movq	%rbx, OP_RBX(%r15)
	movq	%rsi, OP_RSI(%r15)
	movq	%rdi, OP_RDI(%r15)
	movups	%xmm0, OP_XMM(%r15)
	movups	%xmm1, OP_XMM+16(%r15)
	movups	%xmm2, OP_XMM+32(%r15)
	movups	%xmm3, OP_XMM+48(%r15)
	movups	%xmm4, OP_XMM+64(%r15)
	movups	%xmm5, OP_XMM+80(%r15)
	jmp	done

read_msr:
	movl	OP_RCX(%r15), %ecx
	rdmsr
	shlq	$32, %rdx
	orq	%rdx, %rax
	movq	%rax, OP_RAX(%r15)
	jmp	done

write_msr:
	movl	OP_RCX(%r15), %ecx
	movl	OP_RAX(%r15), %eax
	movl	OP_RAX+4(%r15), %edx
	wrmsr
	jmp	done

do_cpuid:
	movl	OP_RAX(%r15), %eax
	movl	OP_RCX(%r15), %ecx
	cpuid
	movq	%rax, OP_RAX(%r15)
	movq	%rbx, OP_RBX(%r15)
	movq	%rcx, OP_RCX(%r15)
	movq	%rdx, OP_RDX(%r15)
	jmp	done

	/* Ring 3 with IOPL 3, so that the port of the call page is reachable at all. */
hypercall_ring3:
	call	load_registers
	leaq	0x3000(%r14), %r9
	pushq	$0x1B
	pushq	%r9
	pushq	$0x3002
	pushq	$0x23
	leaq	user(%rip), %r10
	pushq	%r10
	iretq
user:
	call	*OP_TARGET(%r15)
	movq	%rax, OP_RAX(%r15)
	int	$0x80

	/* Compatibility mode in ring 0: the operands are pairs of 32-bit registers. */
hypercall_32:
	call	load_registers
	movq	%rsp, %r9
	pushq	$0x28
	leaq	legacy(%rip), %r10
	pushq	%r10
	movq	%r15, %rbp
	lretq
	.code32
legacy:
	call	*OP_TARGET(%ebp)
	movl	%eax, OP_RAX(%ebp)
	movl	%edx, OP_RDX(%ebp)
	movl	%ecx, OP_RCX(%ebp)
	movl	%ebx, OP_RBX(%ebp)
	movl	%esi, OP_RSI(%ebp)
	movl	%edi, OP_RDI(%ebp)
	ljmp	$0x08, $long_again
	.code64
long_again:
	movq	%r9, %rsp
	movups	%xmm0, OP_XMM(%r15)
	jmp	done

	/* Until the counter of vector RCX is RDX, or RBX turns have passed. RAX: the counter. */
await:
	movl	OP_RCX(%r15), %ecx
	movq	OP_RBX(%r15), %rbx
	sti
1:	movl	(%r14,%rcx,4), %eax
	cmpl	OP_RDX(%r15), %eax
	jae	2f
	pause
	decq	%rbx
	jnz	1b
2:	cli
	movl	(%r14,%rcx,4), %eax
	movq	%rax, OP_RAX(%r15)
	jmp	done

read_tsc:
	rdtsc
	shlq	$32, %rdx
	orq	%rdx, %rax
	movq	%rax, OP_RAX(%r15)
	jmp	done

load:
	movq	OP_RCX(%r15), %rcx
	movq	(%rcx), %rax
	movq	%rax, OP_RAX(%r15)
	jmp	done

store:
	movq	OP_RCX(%r15), %rcx
	movq	OP_RAX(%r15), %rax
	movq	%rax, (%rcx)
	jmp	done

	/*
	 * RDX readings of the reference time, by the page at RBX and each 1024th by the MSR, against the latest that any VP
	 * has read, which is at RCX. RAX: how many were before it.
	 */
hammer:
	movq	OP_RCX(%r15), %rsi
	movq	OP_RDX(%r15), %r11
	movq	OP_RBX(%r15), %rdi
	xorl	%r10d, %r10d
1:	movq	(%rsi), %r8
	lfence
	testl	$1023, %r11d
	jnz	2f
	movl	$0x40000020, %ecx
	rdmsr
	shlq	$32, %rdx
	orq	%rdx, %rax
	jmp	3f
2:	movl	(%rdi), %r9d
	lfence
	rdtsc
	shlq	$32, %rdx
	orq	%rdx, %rax
	mulq	8(%rdi)
	addq	16(%rdi), %rdx
	movq	%rdx, %rax
	lfence
	cmpl	(%rdi), %r9d
	jne	2b
3:	cmpq	%r8, %rax
	jae	4f
	incq	%r10
	jmp	6f
4:	movq	%rax, %r9
	movq	%r8, %rax
5:	lock cmpxchgq %r9, (%rsi)
	je	6f
	cmpq	%r9, %rax
	jb	5b
6:	decq	%r11
	jnz	1b
	movq	%r10, OP_RAX(%r15)
	jmp	done

triple_fault:
	lidt	0x2F3FF0
	ud2

	/* --- exceptions and interrupts ------------------------------------------------------------------------- */
	.balign	16
stubs:
	.set	vector, 0
	.rept	256
	.balign	16
	.if	vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30
	.else
	pushq	$0
	.endif
	pushq	$vector
	jmp	taken
	.set	vector, vector + 1
	.endr

taken:	/* vector, error code, RIP, CS, RFLAGS, RSP, SS */
	cmpl	$0x80, (%rsp)
	je	3f
	cmpl	$32, (%rsp)
	jb	2f
	pushq	%rax
	pushq	%rcx
	pushq	%rdx
	movl	24(%rsp), %eax
	incl	(%r14,%rax,4)
	movq	EOI_WORD(%r14), %rax
	testq	%rax, %rax
	jz	5f
	btrl	$0, (%rax)		/* "no EOI required" */
	jnc	5f
	incl	EOIS_LEFT_OUT(%r14)
	jmp	6f
5:	movl	$0x80B, %ecx
	xorl	%eax, %eax
	xorl	%edx, %edx
	wrmsr
6:	popq	%rdx
	popq	%rcx
	popq	%rax
	addq	$16, %rsp
	iretq
2:	testq	%r13, %r13
	jz	4f
	movl	(%rsp), %eax
	orl	$0x100, %eax
	movl	%eax, OP_STATUS(%r15)
	movq	8(%rsp), %rax
	movq	%rax, OP_ERROR(%r15)
	movq	16(%rsp), %rax
	movq	%rax, OP_FAULT_RIP(%r15)
3:	leaq	0x4000(%r14), %rsp
	jmp	*%r13
4:	movl	(%rsp), %eax
	outb	%al, $PANIC
	jmp	4b

	/* --- application processors: copied to 0x8000, the page of their start-up IPI ---------------------------- */
	.code16
trampoline:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	lgdtl	0x8FF0			/* a copy of the descriptor, within reach of real mode */
	movl	$0x620, %eax
	movl	%eax, %cr4
	movl	$0x201000, %eax
	movl	%eax, %cr3
	movl	$0xC0000080, %ecx
	rdmsr
	orl	$0x100, %eax
	wrmsr
	movl	$0x80050033, %eax
	movl	%eax, %cr0
	ljmpl	$0x08, $application
trampoline_end:
	.code64
application:
	movl	$0x10, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	jmp	boot
