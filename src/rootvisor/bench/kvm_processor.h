// SPDX-License-Identifier: Apache-2.0
// What the C programs of the benches share: errors, time, and a processor of KVM in long mode at a guest's entry.
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>

enum { PAGE_TABLE = 0x1000, ENTRY = 0x4000, STACK = 0x7F00 }; // in the images of guest_code.py and child_code.py

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int check(int result, const char *what)
{
    if (result < 0)
        die(what);
    return result;
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// With the CPUID that KVM supports.
static void enter_long_mode(int kvm, int vcpu)
{
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + 256 * sizeof cpuid->entries[0]);
    if (!cpuid)
        die("calloc");
    cpuid->nent = 256;
    check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
    check(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
    free(cpuid);
    struct kvm_sregs sregs;
    check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    struct kvm_segment data = { .limit = 0xFFFFFFFF, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
    struct kvm_segment code = data;
    code.selector = 8;
    code.type = 11;
    code.db = 0;
    code.l = 1;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 = 0x80050033;
    sregs.cr3 = PAGE_TABLE;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = { .rip = ENTRY, .rsp = STACK, .rflags = 2 };
    check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}
