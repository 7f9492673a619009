// SPDX-License-Identifier: Apache-2.0
// The reference for the cost of exits: the loop of guest_code.py on bare KVM, answered by the least C that can.
//   exit_loop IMAGE SYNC      SYNC: registers that KVM hands over at every exit (kvm_valid_regs: 1 general,
//                             2 special); 0 hands over nothing but at hypercalls, which need the general ones
// Prints "mark nanoseconds" for every mark of the guest.
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "kvm_processor.h"

enum { MARK_PORT = 0xE4, HYPERCALL_PORT = 0x3C, END_MARK = 0xFF, HYPERCALLS_BEGIN = 2, MAX_MARKS = 1 << 16 };
enum { MSR_FIRST = 0x40000000, MSR_COUNT = 0x1000 };
enum { CALL_GET_PARTITION_ID = 0x46, INVALID_CODE = 2 };

static struct {
    uint8_t mark;
    uint64_t ns;
} marks[MAX_MARKS];

static uint8_t *load(const char *path, size_t *size)
{
    struct stat st;
    int image = check(open(path, O_RDONLY), path);
    check(fstat(image, &st), path);
    *size = (size_t)st.st_size;
    uint8_t *ram = mmap(NULL, *size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        die("mmap");
    for (size_t at = 0; at < *size;) {
        ssize_t part = read(image, ram + at, *size - at);
        if (part <= 0)
            die(path);
        at += (size_t)part;
    }
    return ram;
}

static int new_vm(int kvm, uint8_t *ram, size_t size)
{
    static uint8_t denied[MSR_COUNT / 8];
    int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    struct kvm_enable_cap cap = { .cap = KVM_CAP_X86_USER_SPACE_MSR };
    cap.args[0] = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL;
    check(ioctl(vm, KVM_ENABLE_CAP, &cap), "KVM_ENABLE_CAP");
    struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_ALLOW };
    filter.ranges[0].flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
    filter.ranges[0].base = MSR_FIRST;
    filter.ranges[0].nmsrs = MSR_COUNT;
    filter.ranges[0].bitmap = denied;
    check(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), "KVM_X86_SET_MSR_FILTER");
    check(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    struct kvm_pit_config pit = { 0 };
    check(ioctl(vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
    struct kvm_userspace_memory_region slot = { .memory_size = size, .userspace_addr = (uintptr_t)ram };
    check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    return vm;
}

static void hypercall(struct kvm_run *run, uint8_t *ram, size_t size)
{
    struct kvm_regs *regs = &run->s.regs.regs;
    if ((regs->rcx & 0xFFFF) == CALL_GET_PARTITION_ID && regs->r8 <= size - 8) {
        const uint64_t id = 1;
        memcpy(ram + regs->r8, &id, 8);
        regs->rax = 0;
    } else {
        regs->rax = INVALID_CODE;
    }
    run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
}

// Runs the guest to its last mark; the number of marks.
static size_t run_guest(int vcpu, struct kvm_run *run, uint8_t *ram, size_t size, uint64_t sync)
{
    volatile uint32_t device = 0;
    size_t count = 0;
    for (run->kvm_valid_regs = sync;;) {
        check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_IO) {
            const uint8_t value = *((const uint8_t *)run + run->io.data_offset);
            if (run->io.port == HYPERCALL_PORT) {
                hypercall(run, ram, size);
            } else if (run->io.port != MARK_PORT) {
                device = value;
            } else {
                marks[count].mark = value;
                marks[count].ns = now();
                if (++count == MAX_MARKS || value == END_MARK)
                    break;
                run->kvm_valid_regs = value == HYPERCALLS_BEGIN ? sync | KVM_SYNC_X86_REGS : sync;
            }
        } else if (run->exit_reason == KVM_EXIT_X86_RDMSR) {
            run->msr.error = 0;
            run->msr.data = 0;
        } else {
            fprintf(stderr, "KVM stopped with exit %u\n", run->exit_reason);
            exit(1);
        }
    }
    (void)device;
    return count;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: exit_loop IMAGE SYNC\n");
        return 2;
    }
    size_t size;
    uint8_t *ram = load(argv[1], &size);
    int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    int vm = new_vm(kvm, ram, size);
    int vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    size_t run_size = (size_t)check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        die("mmap");
    enter_long_mode(kvm, vcpu);
    const size_t count = run_guest(vcpu, run, ram, size, strtoull(argv[2], NULL, 0));
    for (size_t at = 0; at < count; at++)
        printf("%u %llu\n", marks[at].mark, (unsigned long long)marks[at].ns);
    return 0;
}
