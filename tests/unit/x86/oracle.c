// SPDX-License-Identifier: Apache-2.0
// Executes instructions on this machine's processor with given registers and memory, and says what became of them.
//
// Everything lies at fixed addresses below 2 GiB, so that code can save and load every register without using one, and
// 32-bit code can run in the same process (code segment 0x23). Linux on x86-64 only.

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BASE 0x70000000
#define CODE (BASE + 0x10000)  // the instruction, and a jump out behind it
#define ARENA (BASE + 0x20000)
#define WINDOW_SIZE 1024
#define WINDOW (ARENA + 0x1000 - WINDOW_SIZE / 2)  // what a case's memory is: half of it on either side of a page boundary
#define LEAVE (BASE + 0x1000)    // 64-bit code that leaves
#define LEAVE_32 (BASE + 0x1100) // 32-bit code that leaves
#define GS_BASE 0x12340          // what tests with a GS prefix reckon with
#define SIZE 0x30000

struct oracle_case {
    uint64_t general[16];
    uint64_t flags;
    uint64_t trap; // exception vector + 1; 0: none
    uint32_t bits; // 64 or 32
    uint32_t width; // bytes of vector registers: 0 (none), 16, 32, 64
    uint32_t length;
    uint8_t code[20];
    uint8_t vectors[32][64];
    uint8_t memory[WINDOW_SIZE];
};

// At BASE: what the assembly works with.
struct context {
    uint64_t general[16]; // 0
    uint64_t flags;       // 128
    uint64_t host_stack;  // 136
    uint64_t target;      // 144
    uint64_t leave;       // 152
    uint8_t far_target[16]; // 160
    uint64_t width;       // 176
    uint64_t trap;        // 184
    uint64_t running;     // 192
    uint64_t unused[7];
    uint8_t vectors[32][64]; // 256
};

#define CONTEXT ((volatile struct context *)(uintptr_t)BASE)

extern void oracle_enter_64(void), oracle_enter_32(void), oracle_leave(void), oracle_recover(void);

__asm__(
    ".set CONTEXT, 0x70000000\n"
    ".macro each_general op\n"
    "  \\op %rax, 0\n \\op %rcx, 8\n \\op %rdx, 16\n \\op %rbx, 24\n \\op %rbp, 40\n \\op %rsi, 48\n \\op %rdi, 56\n"
    "  \\op %r8, 64\n \\op %r9, 72\n \\op %r10, 80\n \\op %r11, 88\n \\op %r12, 96\n \\op %r13, 104\n \\op %r14, 112\n"
    "  \\op %r15, 120\n"
    ".endm\n"
    ".macro load_general register, at\n mov CONTEXT+\\at, \\register\n .endm\n"
    ".macro save_general register, at\n mov \\register, CONTEXT+\\at\n .endm\n"
    ".macro vectors_xmm op\n"
    "  .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n \\op movdqu, %xmm\\n, \\n\n .endr\n.endm\n"
    ".macro vectors_ymm op\n"
    "  .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n \\op vmovdqu, %ymm\\n, \\n\n .endr\n.endm\n"
    ".macro vectors_zmm op\n"
    "  .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
    "  \\op vmovdqu64, %zmm\\n, \\n\n .endr\n.endm\n"
    ".macro load_vector move, register, n\n \\move CONTEXT+256+64*\\n, \\register\n .endm\n"
    ".macro save_vector move, register, n\n \\move \\register, CONTEXT+256+64*\\n\n .endm\n"
    ".macro all_vectors op\n"
    "  cmpq $16, CONTEXT+176\n jb 9f\n je 1f\n cmpq $32, CONTEXT+176\n je 2f\n"
    "  vectors_zmm \\op\n jmp 9f\n"
    "  2: vectors_ymm \\op\n jmp 9f\n"
    "  1: vectors_xmm \\op\n"
    "  9:\n.endm\n"
    ".macro prologue\n"
    "  push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "  mov %rsp, CONTEXT+136\n"
    "  all_vectors load_vector\n"
    ".endm\n"
    ".text\n"
    ".globl oracle_enter_64, oracle_enter_32, oracle_leave, oracle_recover\n"
    "oracle_enter_64:\n"
    "  prologue\n"
    "  pushq CONTEXT+128\n popfq\n"
    "  each_general load_general\n"
    "  mov CONTEXT+32, %rsp\n"
    "  jmp *CONTEXT+144\n"
    "oracle_enter_32:\n"
    "  prologue\n"
    "  mov $0x2b, %eax\n mov %eax, %ds\n mov %eax, %es\n"
    "  pushq CONTEXT+128\n popfq\n"
    "  each_general load_general\n"
    "  mov CONTEXT+32, %rsp\n"
    "  ljmp *CONTEXT+160\n"
    "oracle_leave:\n"
    "  mov %rsp, CONTEXT+32\n"
    "  mov CONTEXT+136, %rsp\n"
    "  pushfq\n popq CONTEXT+128\n"
    "  each_general save_general\n"
    "  all_vectors save_vector\n"
    "oracle_recover:\n"
    "  cld\n"
    "  pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n"
    "  cmpq $32, CONTEXT+176\n jb 1f\n vzeroupper\n 1:\n"
    "  ret\n");

static void on_signal(int number, siginfo_t *info, void *argument) {
    (void)info;
    ucontext_t *state = argument;
    greg_t *registers = state->uc_mcontext.gregs;
    if (!CONTEXT->running) {
        signal(number, SIG_DFL);
        return;
    }
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    for (int n = 0; n < 16; n++)
        CONTEXT->general[n] = (uint64_t)registers[order[n]];
    CONTEXT->flags = (uint64_t)registers[REG_EFL];
    CONTEXT->trap = (uint64_t)registers[REG_TRAPNO] + 1;
    registers[REG_RIP] = (greg_t)oracle_recover;
    registers[REG_RSP] = (greg_t)CONTEXT->host_stack;
    registers[REG_EFL] = 0x202;
    registers[REG_CSGSFS] = (registers[REG_CSGSFS] & ~0xFFFFll) | 0x33;
}

// 0, or the errno of what this machine does not give.
int oracle_prepare(void) {
    void *at = mmap((void *)BASE, SIZE, PROT_READ | PROT_WRITE | PROT_EXEC,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (at == MAP_FAILED)
        return errno;
    uint8_t leave[] = {0xFF, 0x24, 0x25, 0, 0, 0, 0}; // jmp *CONTEXT->leave
    uint32_t pointer = BASE + 152;
    memcpy(leave + 3, &pointer, 4);
    memcpy((void *)LEAVE, leave, sizeof leave);
    uint8_t leave_32[] = {0xEA, 0, 0, 0, 0, 0x33, 0}; // ljmp $0x33, $LEAVE
    uint32_t target = LEAVE;
    memcpy(leave_32 + 1, &target, 4);
    memcpy((void *)LEAVE_32, leave_32, sizeof leave_32);
    CONTEXT->leave = (uint64_t)oracle_leave;
    if (syscall(SYS_arch_prctl, 0x1001 /* ARCH_SET_GS */, (unsigned long)GS_BASE))
        return errno;
    return 0;
}

// Bytes of the vector registers that this processor has.
int oracle_width(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        return 64;
    return __builtin_cpu_supports("avx2") ? 32 : 16;
}

int oracle_has(const char *feature) {
    unsigned a, b, c, d;
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    if (!strcmp(feature, "movdiri"))
        return c >> 27 & 1;
    if (!strcmp(feature, "movdir64b"))
        return c >> 28 & 1;
    if (!strcmp(feature, "bmi2"))
        return b >> 8 & 1;
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(1), "c"(0));
    if (!strcmp(feature, "movbe"))
        return c >> 22 & 1;
    return 0;
}

void oracle_run(struct oracle_case *cases, uint64_t count) {
    static uint8_t signal_stack[65536];
    stack_t stack = {.ss_sp = signal_stack, .ss_size = sizeof signal_stack}, old_stack;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    struct sigaction old[4];
    static const int numbers[4] = {SIGSEGV, SIGFPE, SIGBUS, SIGILL};
    sigaltstack(&stack, &old_stack);
    for (int n = 0; n < 4; n++)
        sigaction(numbers[n], &action, &old[n]);
    for (uint64_t n = 0; n < count; n++) {
        struct oracle_case *one = &cases[n];
        uint8_t *code = (uint8_t *)CODE;
        memcpy((void *)CONTEXT->general, one->general, sizeof one->general);
        CONTEXT->flags = one->flags;
        CONTEXT->width = one->width;
        CONTEXT->trap = 0;
        memcpy(code, one->code, one->length);
        code += one->length;
        memcpy(code, (void *)(uintptr_t)(one->bits == 64 ? LEAVE : LEAVE_32), 7);
        memcpy((void *)WINDOW, one->memory, WINDOW_SIZE);
        if (one->width)
            memcpy((void *)CONTEXT->vectors, one->vectors, sizeof one->vectors);
        CONTEXT->running = 1;
        if (one->bits == 64) {
            CONTEXT->target = CODE;
            oracle_enter_64();
        } else {
            uint32_t target = CODE;
            memcpy((void *)CONTEXT->far_target, &target, 4);
            CONTEXT->far_target[4] = 0x23;
            CONTEXT->far_target[5] = 0;
            oracle_enter_32();
        }
        CONTEXT->running = 0;
        memcpy(one->general, (void *)CONTEXT->general, sizeof one->general);
        one->flags = CONTEXT->flags;
        one->trap = CONTEXT->trap;
        memcpy(one->memory, (void *)WINDOW, WINDOW_SIZE);
        if (one->width && !one->trap)
            memcpy(one->vectors, (void *)CONTEXT->vectors, sizeof one->vectors);
    }
    for (int n = 0; n < 4; n++)
        sigaction(numbers[n], &old[n], NULL);
    sigaltstack(&old_stack, NULL);
}
