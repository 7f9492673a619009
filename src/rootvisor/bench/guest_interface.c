// SPDX-License-Identifier: Apache-2.0
/*
 * What a guest pays for the hypervisor's interface: a bare-metal kernel by the multiboot specification, which runs as
 * it is under `rootvisor run --as guest` and under QEMU with KVM's own Hyper-V emulation. It measures itself in cycles
 * of its TSC, and prints hexadecimal numbers to COM1:
 *
 *	kind cycles...		for every kind of call, the cycles of ROUNDS rounds of CALLS calls
 *	timer cycles...		TIMERS times from the arming of a timer, DELAY ahead in reference time, to its interrupt
 *	clock cycles units	what passed of the TSC and of the reference counter (100 ns) meanwhile
 *	end
 *
 * 32-bit code without paging; processors 1 to VPS - 1 sleep in HLT, and run in a loop for `flush`. Connections come from the test device at TESTDEV
 * (QEMU: hyperv-testdev).
 */
#include <stdint.h>

#ifndef ROUNDS
#define ROUNDS		5
#endif
#ifndef CALLS
#define CALLS		200
#endif
#ifndef TIMERS
#define TIMERS		300
#endif
#define VPS		4
#define DELAY		20000		/* 2 ms */
#define COM1		0x3F8
#define EXIT		0xF4
#define TESTDEV		0x3000
#define CREATE_MESSAGE	4
#define CREATE_EVENT	6
#define MESSAGE		0x10
#define EVENT		0x20
#define MESSAGE_SINT	8
#define EVENT_SINT	9

#define GUEST_OS_ID	0x40000000
#define HYPERCALL	0x40000001
#define TIME_REF_COUNT	0x40000020
#define SCONTROL	0x40000080
#define SIEFP		0x40000082
#define SIMP		0x40000083
#define EOM		0x40000084
#define SINT0		0x40000090
#define STIMER0_CONFIG	0x400000B0
#define STIMER0_COUNT	0x400000B1
#define DIRECT		(1 << 12)
#define AUTO_ENABLE	(1 << 3)

#define CALL_FLUSH	0x0002
#define CALL_SPIN_WAIT	0x0008
#define CALL_IPI	0x000B
#define CALL_MESSAGE	0x005C
#define CALL_EVENT	0x005D
#define FAST		(1 << 16)

enum { TIMER_VECTOR = 0xE0, MESSAGE_VECTOR, EVENT_VECTOR, IPI_VECTOR };

__asm__(
"	.section .text.start, \"ax\"\n"
"	.code32\n"
"	.balign 4\n"
"	.long 0x1BADB002, 0, -0x1BADB002\n"
"	.globl _start\n"
"_start:	movl $stacks + 0x4000, %esp\n"
"	lgdt gdt_pointer\n"
"	ljmp $8, $1f\n"
"1:	call segments\n"
"	call start\n"
"	.globl trampoline, trampoline_end\n"
"	.code16\n"
"trampoline: cli\n"
"	xorw %ax, %ax\n"
"	movw %ax, %ds\n"
"	lgdtl 0x8000 + gdt_copy - trampoline\n"
"	movl $0x11, %eax\n"
"	movl %eax, %cr0\n"
"	ljmpl $8, $application\n"
"gdt_copy: .word 23\n"
"	.long gdt\n"
"trampoline_end:\n"
"	.code32\n"
"segments: movl $16, %eax\n"
"	movl %eax, %ds\n"
"	movl %eax, %es\n"
"	movl %eax, %ss\n"
"	ret\n"
"application: movl $16, %eax\n"
"	movl %eax, %ds\n"
"	movl %eax, %es\n"
"	movl %eax, %ss\n"
"	movl $1, %eax\n"
"	lock xaddl %eax, started\n"
"	incl %eax\n"
"	shll $14, %eax\n"
"	leal stacks + 0x4000(%eax), %esp\n"
"	call other\n"
"	.macro handler name, body\n"
"	.globl \\name\n"
"\\name:	pushal\n"
"	call \\body\n"
"	popal\n"
"	iretl\n"
"	.endm\n"
"	handler on_timer, timer_taken\n"
"	handler on_message, message_taken\n"
"	handler on_event, event_taken\n"
"	handler on_ipi, ipi_taken\n"
"	.data\n"
"	.balign 16\n"
"gdt:	.quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF\n"
"gdt_pointer: .word 23\n"
"	.long gdt\n"
"	.text\n");

extern char trampoline[], trampoline_end[];
extern void on_timer(void), on_message(void), on_event(void), on_ipi(void);
uint8_t stacks[VPS * 0x4000] __attribute__((aligned(16)));
volatile uint32_t started;
static uint64_t idt[256];
static uint8_t call_page[4096] __attribute__((aligned(4096)));
static volatile uint8_t messages[4096] __attribute__((aligned(4096)));
static volatile uint8_t events[4096] __attribute__((aligned(4096)));
static uint64_t operands[32] __attribute__((aligned(4096)));
static volatile uint32_t messages_taken, events_taken, ipis_taken[VPS], timer_fired;
static volatile uint64_t timer_at;
static volatile uint32_t busy;

static inline uint64_t rdtsc(void)
{
	uint32_t low, high;

	__asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high));
	return (uint64_t)high << 32 | low;
}

static inline uint64_t rdmsr(uint32_t index)
{
	uint32_t low, high;

	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
	return (uint64_t)high << 32 | low;
}

static inline void wrmsr(uint32_t index, uint64_t value)
{
	__asm__ volatile("wrmsr" : : "c"(index), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static inline void out8(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out32(uint16_t port, uint32_t value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static void say(const char *text)
{
	while (*text)
		out8(COM1, *text++);
}

static void number(uint64_t value)
{
	char digits[18];
	int at = 17;

	digits[at] = 0;
	do {
		digits[--at] = "0123456789abcdef"[value & 15];
		value >>= 4;
	} while (value);
	say(" ");
	say(digits + at);
}

static uint32_t hypercall(uint32_t control, uint64_t input)
{
	uint32_t status = control, high = 0, b = input >> 32, c = (uint32_t)input, s = 0, d = 0;

	__asm__ volatile("call *%[page]"
			 : "+a"(status), "+d"(high), "+b"(b), "+c"(c), "+S"(s), "+D"(d)
			 : [page] "m"((void *){call_page})
			 : "memory", "cc");
	return status & 0xFFFF;
}

static void fail(const char *what, uint32_t value)
{
	say("failed ");
	say(what);
	number(value);
	say("\n");
	out32(EXIT, 1);
	for (;;)
		__asm__ volatile("cli; hlt");
}

static void end_of_interrupt(void)
{
	wrmsr(0x80B, 0);
}

void timer_taken(void)
{
	timer_at = rdtsc();
	timer_fired = 1;
	end_of_interrupt();
}

void message_taken(void)
{
	volatile uint32_t *slot = (volatile uint32_t *)(messages + MESSAGE_SINT * 256);
	uint8_t pending;

	if (*slot) {
		*slot = 0;
		__asm__ volatile("lock; addl $0, (%%esp)" : : : "memory", "cc");
		pending = ((volatile uint8_t *)slot)[5] & 1;
		messages_taken++;
		if (pending)
			wrmsr(EOM, 0);
	}
	end_of_interrupt();
}

void event_taken(void)
{
	volatile uint8_t *flags = events + EVENT_SINT * 256;

	flags[EVENT / 8] &= ~(1 << EVENT % 8);
	events_taken++;
	end_of_interrupt();
}

void ipi_taken(void)
{
	ipis_taken[rdmsr(0x802)]++;
	end_of_interrupt();
}

static void gate(int vector, void (*handler)(void))
{
	uint32_t at = (uint32_t)handler;

	idt[vector] = (uint64_t)(at >> 16) << 48 | (uint64_t)0x8E00 << 32 | 8 << 16 | (at & 0xFFFF);
}

static void processor(void)
{
	struct {
		uint16_t limit;
		uint32_t base;
	} __attribute__((packed)) pointer = {sizeof(idt) - 1, (uint32_t)idt};

	__asm__ volatile("lidt %0" : : "m"(pointer));
	wrmsr(0x1B, rdmsr(0x1B) | 0xC00);
	wrmsr(0x80F, 0x1FF);
}

void other(void)
{
	processor();
	for (;;) {
		if (busy)
			__asm__ volatile("sti; pause");
		else
			__asm__ volatile("sti; hlt");
	}
}

/* Sleeps until *counter differs from before. */
static void await(volatile uint32_t *counter, uint32_t before)
{
	for (;;) {
		__asm__ volatile("cli");
		if (*counter != before)
			break;
		__asm__ volatile("sti; hlt");
	}
	__asm__ volatile("sti");
}

static void spin_wait(void)
{
	uint32_t status = hypercall(CALL_SPIN_WAIT | FAST, 0);

	if (status && status != 6)	/* KVM denies it where it recommends it never, at the same cost */
		fail("spin wait", status);
}

static void ipi_to(uint64_t mask)
{
	uint32_t status;

	operands[0] = IPI_VECTOR;
	operands[1] = mask;
	status = hypercall(CALL_IPI, (uint32_t)operands);
	if (status)
		fail("ipi", status);
}

static void ipi_to_nobody(void)
{
	ipi_to(0);
}

static void ipi_to_all(void)
{
	uint32_t before[VPS];
	int vp;

	for (vp = 0; vp < VPS; vp++)
		before[vp] = ipis_taken[vp];
	ipi_to((1 << VPS) - 1);
	for (vp = 0; vp < VPS; vp++)
		while (ipis_taken[vp] == before[vp])
			__asm__ volatile("pause");
}

static void flush_all(void)
{
	uint32_t status;

	operands[0] = 0;
	operands[1] = 3;		/* all processors, all address spaces */
	operands[2] = 0;
	status = hypercall(CALL_FLUSH, (uint32_t)operands);
	if (status)
		fail("flush", status);
}

static void message(void)
{
	uint32_t before = messages_taken, status;

	operands[0] = MESSAGE;
	operands[1] = 1 | (uint64_t)8 << 32;
	operands[2] = before;
	do	/* QEMU frees its one buffer a little after the message has arrived */
		status = hypercall(CALL_MESSAGE, (uint32_t)operands);
	while (status == 0x13);
	if (status)
		fail("message", status);
	await(&messages_taken, before);
}

static void event(void)
{
	uint32_t before = events_taken, status;

	status = hypercall(CALL_EVENT | FAST, EVENT);
	if (status)
		fail("event", status);
	await(&events_taken, before);
}

static void measure(const char *kind, void (*call)(void))
{
	uint64_t cycles[ROUNDS], before;
	int round, one;

	call();
	for (round = 0; round < ROUNDS; round++) {
		before = rdtsc();
		for (one = 0; one < CALLS; one++)
			call();
		cycles[round] = rdtsc() - before;
	}
	say(kind);
	for (round = 0; round < ROUNDS; round++)
		number(cycles[round]);
	say("\n");
}

static uint64_t lateness[TIMERS];

static void timers(void)
{
	uint64_t now, armed;
	int one;

	wrmsr(STIMER0_CONFIG, DIRECT | AUTO_ENABLE | TIMER_VECTOR << 4);
	for (one = 0; one < TIMERS; one++) {
		timer_fired = 0;
		now = rdmsr(TIME_REF_COUNT);
		armed = rdtsc();
		wrmsr(STIMER0_COUNT, now + DELAY);
		await(&timer_fired, 0);
		lateness[one] = timer_at - armed;
	}
	say("timer");
	for (one = 0; one < TIMERS; one++)
		number(lateness[one]);
	say("\n");
}

void start(void)
{
	uint64_t began, counter;
	char *from = trampoline, *to = (char *)0x8000;
	int vector;

	while (from < trampoline_end)
		*to++ = *from++;
	for (vector = 0; vector < 4; vector++)
		gate(TIMER_VECTOR + vector,
		     vector == 0 ? on_timer : vector == 1 ? on_message : vector == 2 ? on_event : on_ipi);
	/* A legacy timer that nobody has asked for must not come in between. */
	out8(0x21, 0xFF);
	out8(0xA1, 0xFF);
	processor();
	wrmsr(0x830, 0xC4500);
	for (counter = rdtsc(); rdtsc() - counter < 50000000;)
		;
	wrmsr(0x830, 0xC4608);
	while (started < VPS - 1)
		__asm__ volatile("pause");
	wrmsr(GUEST_OS_ID, 0x8100000700030000ull);
	wrmsr(HYPERCALL, (uint32_t)call_page | 1);
	wrmsr(SIMP, (uint32_t)messages | 1);
	wrmsr(SIEFP, (uint32_t)events | 1);
	wrmsr(SCONTROL, 1);
	wrmsr(SINT0 + MESSAGE_SINT, MESSAGE_VECTOR);
	wrmsr(SINT0 + EVENT_SINT, EVENT_VECTOR);
	out32(TESTDEV, MESSAGE << 24 | CREATE_MESSAGE << 16 | MESSAGE_SINT);
	out32(TESTDEV, EVENT << 24 | CREATE_EVENT << 16 | EVENT_SINT);
	__asm__ volatile("sti");
	began = rdtsc();
	counter = rdmsr(TIME_REF_COUNT);
	measure("fast", spin_wait);
	measure("memory", ipi_to_nobody);
	measure("message", message);
	measure("event", event);
	measure("ipi", ipi_to_all);
	busy = 1;
	ipi_to_all();
	measure("flush", flush_all);
	busy = 0;
	timers();
	say("clock");
	number(rdtsc() - began);
	number(rdmsr(TIME_REF_COUNT) - counter);
	say("\nend\n");
	out32(EXIT, 0);
	for (;;)
		__asm__ volatile("cli; hlt");
}
