// SPDX-License-Identifier: Apache-2.0
// The least VMM that answers the guest of child_code.py: on bare KVM, or through /dev/mshv.
//   child_loop kvm|mshv IMAGE ROUNDS COUNT   ROUNDS guests, one after the other; COUNT events of each kind
//   child_loop kvm|mshv IMAGE idle N         N guests that wait for ever
// Prints "create NS" (until the first instruction's exit), "mark MARK NS" for every mark, "delete NS"; or "idle N KIB"
// when the first waits and when all do (KIB: memory in use, see used_kib), each time until a byte is read.
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include "kvm_processor.h"

enum { MARK_PORT = 0xE4, IMAGE_BYTES = 0x10000, VECTOR = 0x40 };
enum { RAM_BYTES = 0x200000, FRESH_GPA = 0x10000000, FRESH_BYTES = 0x10000000, HUGE_BYTES = 0x200000 };
enum { DOORBELL_GPA = 0x20001000, SEEN_GPA = 0x8000, TAKEN_GPA = 0x8008 };
enum { HYPERCALL_MARK = 1, MMIO_MARK = 2, IRQ_MARK = 4, END_MARK = 6, MAX_IDLE = 256 };

// /dev/mshv (include/uapi/linux/mshv.h)
struct mshv_create { uint64_t flags, isolation; };
struct mshv_memory { uint64_t size, gfn, address; uint8_t flags, reserved[7]; };
struct mshv_irqfd { int32_t fd, resample_fd; uint32_t gsi, flags; };
struct mshv_ioeventfd { uint64_t datamatch, addr; uint32_t len; int32_t fd; uint32_t flags, reserved; };
struct mshv_routing { uint32_t count, reserved, gsi, address_low, address_high, data; };
struct mshv_hvcall { uint16_t code, reps, in_size, out_size, status, reserved[3]; uint64_t in, out; };
#define MSHV_CREATE_PARTITION _IOW(0xB8, 0, struct mshv_create)
#define MSHV_INITIALIZE_PARTITION _IO(0xB8, 0)
#define MSHV_CREATE_VP _IOW(0xB8, 1, uint32_t)
#define MSHV_SET_GUEST_MEMORY _IOW(0xB8, 2, struct mshv_memory)
#define MSHV_IRQFD _IOW(0xB8, 3, struct mshv_irqfd)
#define MSHV_IOEVENTFD _IOW(0xB8, 4, struct mshv_ioeventfd)
#define MSHV_SET_MSI_ROUTING 0x4008B805
#define MSHV_ROOT_HVCALL _IOWR(0xB8, 7, struct mshv_hvcall)
#define MSHV_RUN_VP 0x8100B800
enum { PT_LAPIC = 1, PT_X2APIC = 2, PT_SUPER_PAGES = 4, MEMORY_WRITABLE = 1, MEMORY_EXECUTABLE = 2 };
enum { CALL_SET_REGISTERS = 0x51, UNMAPPED_GPA = 0x80000000, IO_PORT = 0x80010000 };
enum { R_RAX = 0x20000, R_RSP = 0x20004, R_RIP = 0x20010, R_RFLAGS = 0x20011, R_CR0 = 0x40000, R_CR3 = 0x40002 };
enum { R_CR4 = 0x40003, R_ES = 0x60000, R_CS = 0x60001, R_EFER = 0x80001, MAX_REGISTERS = 16 };
// the message: header 16, then vp u32, length u8, access u8, state u16, cs 16, rip u64, rflags u64, ...
enum { MESSAGE_RIP = 16 + 24, MESSAGE_LENGTH = 16 + 4, MESSAGE_PORT = 16 + 40, MESSAGE_RAX = 16 + 48 };
// the register page: dirty u32, rip u64
enum { PAGE_DIRTY = 4, PAGE_RIP = 0x88, DIRTY_RIP = 2 };

struct guest {
    int partition, vp, doorbell, irq;
    uint8_t *ram, *fresh, *page; // page: kvm_run, or the register page
    size_t page_size;
    uint32_t count;
    int end;
    pthread_t ringer, raiser;
};

static int on_kvm, device;
static uint8_t *image;

static uint8_t *memory(size_t size, int fd, int flags)
{
    uint8_t *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED)
        die("mmap");
    return at;
}

// Memory of a guest as VMMs take it: private, huge pages where there are some.
static uint8_t *guest_memory(size_t size)
{
    uint8_t *at = memory(size + HUGE_BYTES, -1, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
    uint8_t *aligned = (uint8_t *)(((uintptr_t)at + HUGE_BYTES - 1) & ~(uintptr_t)(HUGE_BYTES - 1));
    if (aligned != at)
        munmap(at, (size_t)(aligned - at));
    munmap(aligned + size, HUGE_BYTES - (size_t)(aligned - at));
    madvise(aligned, size, MADV_HUGEPAGE);
    return aligned;
}

static volatile uint64_t *word(struct guest *g, size_t gpa)
{
    return (volatile uint64_t *)(g->ram + gpa);
}

// --- KVM -------------------------------------------------------------------------------------------------------------
static void kvm_slot(struct guest *g, uint32_t slot, uint64_t gpa, uint64_t size, uint8_t *at)
{
    struct kvm_userspace_memory_region region = { .slot = slot, .guest_phys_addr = gpa, .memory_size = size };
    region.userspace_addr = (uintptr_t)at;
    check(ioctl(g->partition, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

static void kvm_create(struct guest *g)
{
    g->partition = check(ioctl(device, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP, .args = { 24 } };
    check(ioctl(g->partition, KVM_ENABLE_CAP, &split), "KVM_CAP_SPLIT_IRQCHIP");
    kvm_slot(g, 0, 0, RAM_BYTES, g->ram);
    kvm_slot(g, 1, FRESH_GPA, FRESH_BYTES, g->fresh);
    g->vp = check(ioctl(g->partition, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    g->page_size = (size_t)check(ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    g->page = memory(g->page_size, g->vp, MAP_SHARED);
    enter_long_mode(device, g->vp);
    struct kvm_ioeventfd bell = { .addr = DOORBELL_GPA, .len = 4, .fd = g->doorbell };
    check(ioctl(g->partition, KVM_IOEVENTFD, &bell), "KVM_IOEVENTFD");
    struct {
        struct kvm_irq_routing head;
        struct kvm_irq_routing_entry entry;
    } routes = { .head = { .nr = 1 } };
    routes.entry.gsi = 24;
    routes.entry.type = KVM_IRQ_ROUTING_MSI;
    routes.entry.u.msi.address_lo = 0xFEE00000;
    routes.entry.u.msi.data = VECTOR;
    check(ioctl(g->partition, KVM_SET_GSI_ROUTING, &routes), "KVM_SET_GSI_ROUTING");
    struct kvm_irqfd irq = { .fd = (uint32_t)g->irq, .gsi = 24 };
    check(ioctl(g->partition, KVM_IRQFD, &irq), "KVM_IRQFD");
}

// Runs until the guest needs something; the byte that it gave to the mark port, or -1 for another event.
static int kvm_run(struct guest *g)
{
    struct kvm_run *run = (struct kvm_run *)g->page;
    check(ioctl(g->vp, KVM_RUN, 0), "KVM_RUN");
    if (run->exit_reason == KVM_EXIT_IO)
        return run->io.port == MARK_PORT ? *(g->page + run->io.data_offset) : -1;
    if (run->exit_reason == KVM_EXIT_MMIO)
        return -1;
    fprintf(stderr, "KVM stopped with exit %u\n", run->exit_reason);
    exit(1);
}

// --- /dev/mshv -------------------------------------------------------------------------------------------------------
struct register_value { uint32_t name, reserved[3]; uint64_t low, high; };

static void mshv_set(struct guest *g, const struct register_value *values, uint16_t count)
{
    struct {
        uint64_t partition;
        uint32_t vp, vtl;
        struct register_value values[MAX_REGISTERS];
    } input = { 0 };
    memcpy(input.values, values, count * sizeof *values);
    struct mshv_hvcall call = { .code = CALL_SET_REGISTERS, .reps = count };
    call.in_size = (uint16_t)(16 + count * sizeof *values);
    call.in = (uintptr_t)&input;
    check(ioctl(g->vp, MSHV_ROOT_HVCALL, &call), "HVCALL_SET_VP_REGISTERS");
}

static void mshv_map(struct guest *g, uint64_t gpa, uint64_t size, uint8_t *at)
{
    struct mshv_memory region = { .size = size, .gfn = gpa >> 12, .address = (uintptr_t)at };
    region.flags = MEMORY_WRITABLE | MEMORY_EXECUTABLE;
    check(ioctl(g->partition, MSHV_SET_GUEST_MEMORY, &region), "MSHV_SET_GUEST_MEMORY");
}

static void mshv_create(struct guest *g)
{
    struct mshv_create create = { .flags = PT_LAPIC | PT_X2APIC | PT_SUPER_PAGES };
    g->partition = check(ioctl(device, MSHV_CREATE_PARTITION, &create), "MSHV_CREATE_PARTITION");
    check(ioctl(g->partition, MSHV_INITIALIZE_PARTITION), "MSHV_INITIALIZE_PARTITION");
    mshv_map(g, 0, RAM_BYTES, g->ram);
    mshv_map(g, FRESH_GPA, FRESH_BYTES, g->fresh);
    const uint32_t index = 0;
    g->vp = check(ioctl(g->partition, MSHV_CREATE_VP, &index), "MSHV_CREATE_VP");
    g->page_size = 4096;
    g->page = memory(g->page_size, g->vp, MAP_SHARED);
    // limit u32, selector u16, attributes u16
    const uint64_t code = 0xA09B0008FFFFFFFF, data = 0xC0930010FFFFFFFF;
    struct register_value values[] = {
        { .name = R_CR0, .low = 0x80050033 }, { .name = R_CR3, .low = PAGE_TABLE }, { .name = R_CR4, .low = 0x20 },
        { .name = R_EFER, .low = 0x500 },     { .name = R_RIP, .low = ENTRY },      { .name = R_RSP, .low = STACK },
        { .name = R_RFLAGS, .low = 2 },       { .name = R_ES, .high = data },       { .name = R_CS, .high = code },
        { .name = R_CS + 1, .high = data },   { .name = R_CS + 2, .high = data },   { .name = R_CS + 3, .high = data },
        { .name = R_CS + 4, .high = data },
    };
    mshv_set(g, values, sizeof values / sizeof *values);
    struct mshv_ioeventfd bell = { .addr = DOORBELL_GPA, .len = 4, .fd = g->doorbell };
    check(ioctl(g->partition, MSHV_IOEVENTFD, &bell), "MSHV_IOEVENTFD");
    struct mshv_routing routes = { .count = 1, .gsi = 24, .address_low = 0xFEE00000, .data = VECTOR };
    check(ioctl(g->partition, MSHV_SET_MSI_ROUTING, &routes), "MSHV_SET_MSI_ROUTING");
    struct mshv_irqfd irq = { .fd = g->irq, .gsi = 24 };
    check(ioctl(g->partition, MSHV_IRQFD, &irq), "MSHV_IRQFD");
}

static int mshv_run(struct guest *g, int by_hypercall, uint64_t *rip)
{
    uint8_t message[256];
    if (*rip) {
        if (by_hypercall) {
            const struct register_value value = { .name = R_RIP, .low = *rip };
            mshv_set(g, &value, 1);
        } else {
            memcpy(g->page + PAGE_RIP, rip, 8);
            *(volatile uint32_t *)(g->page + PAGE_DIRTY) |= DIRTY_RIP;
        }
    }
    check(ioctl(g->vp, MSHV_RUN_VP, message), "MSHV_RUN_VP");
    uint32_t type;
    memcpy(&type, message, 4);
    memcpy(rip, message + MESSAGE_RIP, 8);
    *rip += 2; // every instruction of the guest that is told of has two bytes
    if (type == IO_PORT)
        return message[MESSAGE_PORT] == MARK_PORT ? message[MESSAGE_RAX] : -1;
    if (type == UNMAPPED_GPA)
        return -1;
    fprintf(stderr, "unexpected message %#x\n", type);
    exit(1);
}

// --- the guest's life ------------------------------------------------------------------------------------------------
// Counts doorbells for the guest to see.
static void *ringer(void *argument)
{
    struct guest *g = argument;
    for (;;) {
        uint64_t rings;
        if (read(g->doorbell, &rings, 8) != 8)
            die("read of a doorbell");
        if (__atomic_load_n(&g->end, __ATOMIC_SEQ_CST))
            return NULL;
        *word(g, SEEN_GPA) += rings;
    }
}

// One interrupt after the other, each when the guest has taken the one before.
static void *raiser(void *argument)
{
    struct guest *g = argument;
    const uint64_t one = 1;
    for (uint64_t raised = 0; raised < g->count; raised++) {
        if (write(g->irq, &one, 8) != 8)
            die("write of an irqfd");
        while (*word(g, TAKEN_GPA) <= raised)
            __builtin_ia32_pause();
    }
    return NULL;
}

static void create(struct guest *g)
{
    g->ram = guest_memory(RAM_BYTES);
    g->fresh = guest_memory(FRESH_BYTES);
    memcpy(g->ram, image, IMAGE_BYTES);
    g->doorbell = check(eventfd(0, EFD_CLOEXEC), "eventfd");
    g->irq = check(eventfd(0, EFD_CLOEXEC), "eventfd");
    (on_kvm ? kvm_create : mshv_create)(g);
}

static void delete(struct guest *g)
{
    munmap(g->page, g->page_size);
    close(g->vp);
    close(g->partition);
}

static void live(struct guest *g)
{
    static struct { int mark; uint64_t ns; } marks[END_MARK + 1];
    uint64_t rip = 0, started = now();
    create(g);
    check(pthread_create(&g->ringer, NULL, ringer, g), "pthread_create");
    int mark = -1, last = -1, count = 0;
    while (last != END_MARK) {
        mark = on_kvm ? kvm_run(g) : mshv_run(g, last == HYPERCALL_MARK, &rip);
        if (mark < 0)
            continue;
        last = marks[count].mark = mark;
        marks[count++].ns = now();
        if (mark == IRQ_MARK)
            check(pthread_create(&g->raiser, NULL, raiser, g), "pthread_create");
    }
    pthread_join(g->raiser, NULL);
    const uint64_t stopping = now();
    delete (g);
    const uint64_t stopped = now();
    printf("create %llu\n", (unsigned long long)(marks[0].ns - started));
    for (int at = 0; at < count; at++)
        printf("mark %d %llu\n", marks[at].mark, (unsigned long long)marks[at].ns);
    printf("delete %llu\n", (unsigned long long)(stopped - stopping));
    fflush(stdout);
    __atomic_store_n(&g->end, 1, __ATOMIC_SEQ_CST);
    const uint64_t one = 1;
    if (write(g->doorbell, &one, 8) != 8)
        die("write of a doorbell");
    pthread_join(g->ringer, NULL);
    close(g->doorbell);
    close(g->irq);
    munmap(g->ram, RAM_BYTES);
    munmap(g->fresh, FRESH_BYTES);
}

static unsigned waiting;

static void *idle(void *argument)
{
    struct guest *g = argument;
    uint64_t rip = 0;
    for (;;)
        if ((on_kvm ? kvm_run(g) : mshv_run(g, 0, &rip)) >= 0)
            __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

// What Linux has given away in KiB, besides page cache, and besides what this process has for itself (guest memory).
static long used_kib(void)
{
    static const struct { const char *path, *name; int sign; } facts[] = {
        { "/proc/meminfo", "MemTotal", 1 },      { "/proc/meminfo", "MemFree", -1 },
        { "/proc/meminfo", "Buffers", -1 },      { "/proc/meminfo", "Cached", -1 },
        { "/proc/meminfo", "SReclaimable", -1 }, { "/proc/self/status", "RssAnon", -1 },
    };
    long sum = 0;
    for (size_t at = 0; at < sizeof facts / sizeof *facts; at++) {
        char line[256];
        const size_t length = strlen(facts[at].name);
        FILE *file = fopen(facts[at].path, "r");
        if (!file)
            die(facts[at].path);
        while (fgets(line, sizeof line, file))
            if (!strncmp(line, facts[at].name, length) && line[length] == ':')
                sum += facts[at].sign * atol(line + length + 1);
        fclose(file);
    }
    return sum;
}

// Memory in use when it changes no more: what went before is given back bit by bit.
static long settled_kib(void)
{
    long before = used_kib();
    for (int looks = 0, same = 0; looks < 50 && same < 3; looks++) {
        usleep(100000);
        const long after = used_kib();
        same = labs(after - before) < 128 ? same + 1 : 0;
        before = after;
    }
    return before;
}

static void say_idle(unsigned count)
{
    char byte;
    printf("idle %u %ld\n", count, settled_kib());
    fflush(stdout);
    if (read(0, &byte, 1) < 0)
        die("read of standard input");
}

static void idle_guests(unsigned count)
{
    static struct guest guests[MAX_IDLE];
    for (unsigned at = 0; at < count; at++) {
        if (at == 1) // the first one has brought into memory what all need
            say_idle(1);
        create(&guests[at]);
        check(pthread_create(&guests[at].raiser, NULL, idle, &guests[at]), "pthread_create");
        while (__atomic_load_n(&waiting, __ATOMIC_SEQ_CST) <= at)
            usleep(1000);
    }
    say_idle(count);
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: child_loop kvm|mshv IMAGE ROUNDS COUNT | idle N\n");
        return 2;
    }
    on_kvm = !strcmp(argv[1], "kvm");
    device = check(open(on_kvm ? "/dev/kvm" : "/dev/mshv", O_RDWR | O_CLOEXEC), on_kvm ? "/dev/kvm" : "/dev/mshv");
    image = memory(IMAGE_BYTES, -1, MAP_PRIVATE | MAP_ANONYMOUS);
    const int file = check(open(argv[2], O_RDONLY), argv[2]);
    if (read(file, image, IMAGE_BYTES) != IMAGE_BYTES)
        die(argv[2]);
    const unsigned number = (unsigned)strtoul(argv[4], NULL, 0);
    if (!strcmp(argv[3], "idle")) {
        if (number > MAX_IDLE)
            return 2;
        idle_guests(number);
        _exit(0);
    }
    for (unsigned rounds = (unsigned)strtoul(argv[3], NULL, 0); rounds; rounds--) {
        struct guest g = { .count = number };
        live(&g);
    }
    return 0;
}
