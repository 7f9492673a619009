// SPDX-License-Identifier: Apache-2.0
// The reference for the cost of an exit: the same ioctl on the same VP, answered in C. See exits.py.
#include <errno.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Runs the VP until it writes `end` to `mark_port`; times[v] is when it wrote v there (v < 256).
// Returns 0, or -1 with the exit reason (or -errno) in *why.
int exit_loop(int fd, struct kvm_run *run, int mark_port, int call_port, int end, long long *times, int *why)
{
    for (;;) {
        if (ioctl(fd, KVM_RUN, 0) < 0) {
            if (errno == EINTR || errno == EAGAIN)
                continue;
            *why = -errno;
            return -1;
        }
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            if (run->io.port == call_port) {
                // what a hypercall needs at least: its control word in, a status out
                if ((run->s.regs.regs.rcx & 0xffff) == 0)
                    return -1;
                run->s.regs.regs.rax = 0;
                run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
            } else if (run->io.port == mark_port) {
                unsigned char value = *((unsigned char *)run + run->io.data_offset);
                times[value] = now();
                if (value == end)
                    return 0;
            }
            break;
        case KVM_EXIT_X86_RDMSR:
            run->msr.data = 0;
            run->msr.error = 0;
            break;
        case KVM_EXIT_X86_WRMSR:
            run->msr.error = 0;
            break;
        default:
            *why = run->exit_reason;
            return -1;
        }
    }
}
