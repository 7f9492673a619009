// SPDX-License-Identifier: Apache-2.0
/*
 * A bare-metal kernel by the multiboot specification: writes its command line and the hypervisor's vendor to COM1, and
 * the number of processors (of the firmware configuration device) to the exit port.
 */
#define COM1		0x3F8
#define EXIT		0xF4
#define CONFIGURATION	0x510
#define MAGIC		0x1BADB002

	.text
	.code32
	.balign	4
	.long	MAGIC, 0, -MAGIC

	.globl	_start
_start:
	movl	$stack, %esp
	cmpl	$0x2BADB002, %eax
	jne	bad
	movl	16(%ebx), %esi		/* the command line */
	call	print
	movl	$0x40000000, %eax
	cpuid
	movl	%ebx, vendor
	movl	%ecx, vendor+4
	movl	%edx, vendor+8
	movl	$vendor, %esi
	call	print
	movl	$5, %eax
	movl	$CONFIGURATION, %edx
	outw	%ax, %dx
	incl	%edx
	xorl	%eax, %eax
	inb	%dx, %al
	outl	%eax, $EXIT
1:	hlt
	jmp	1b
bad:	movl	$0x77, %eax
	outl	%eax, $EXIT
	jmp	1b

print:	movl	$COM1, %edx		/* the string at ESI, and a new line */
1:	lodsb
	testb	%al, %al
	jz	2f
	outb	%al, %dx
	jmp	1b
2:	movb	$'\n', %al
	outb	%al, %dx
	ret

	.data
vendor:	.asciz	"????????????"
	.bss
	.balign	16
	.skip	4096
stack:
