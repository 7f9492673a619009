// SPDX-License-Identifier: Apache-2.0
// What tests of the VMM do in a guest and, for the other end, in the root: a static program with one verb a run.
// It speaks in lines "guest: KEY VALUE" as the guest's init does.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <sys/socket.h>
#include "guest_program.h"

enum { BLOCK = 4096 };

static void fill(uint64_t *block, uint64_t number) {
    uint64_t state = number * 0x9e3779b97f4a7c15u + 1;
    block[0] = number;
    for (int i = 1; i < BLOCK / 8; i++)
        block[i] = next(&state);
}

// journal DEVICE FIRST COUNT: writes numbered blocks, flushes after each, and says so once the flush is through.
static int journal(const char *device, uint64_t first, uint64_t count) {
    int fd = open(device, O_RDWR);
    uint64_t *block = aligned(BLOCK);
    if (fd < 0)
        die(device);
    for (uint64_t number = first; number < first + count; number++) {
        fill(block, number);
        if (pwrite(fd, block, BLOCK, number * BLOCK) != BLOCK)
            die("write");
        if (fdatasync(fd))
            die("flush");
        say("guest: flushed %llu", (unsigned long long)number);
    }
    return 0;
}

// check DEVICE COUNT: how many of the first blocks are as journal writes them.
static int check(const char *device, uint64_t count) {
    int fd = open(device, O_RDONLY);
    uint64_t *block = aligned(BLOCK), *wanted = aligned(BLOCK), good = 0;
    if (fd < 0)
        die(device);
    for (uint64_t number = 0; number < count; number++) {
        if (pread(fd, block, BLOCK, number * BLOCK) != BLOCK)
            die("read");
        fill(wanted, number);
        good += !memcmp(block, wanted, BLOCK);
    }
    say("guest: good %llu", (unsigned long long)good);
    return 0;
}

// work DEVICE BLOCKS: computes for ever; each step depends on all before it, goes to the disk, is read back, and said.
static _Noreturn void work(const char *device, uint64_t blocks) {
    int fd = open(device, O_RDWR | O_DIRECT);
    uint64_t *block = aligned(BLOCK), *back = aligned(BLOCK), state = 1;
    if (fd < 0)
        die(device);
    for (uint64_t step = 0;; step++) {
        for (int i = 0; i < 20000; i++)
            next(&state);
        fill(block, state);
        off_t at = (off_t)(step % blocks) * BLOCK;
        if (pwrite(fd, block, BLOCK, at) != BLOCK || pread(fd, back, BLOCK, at) != BLOCK)
            die("disk");
        if (memcmp(block, back, BLOCK))
            say("guest: problem block %llu is not what was written", (unsigned long long)step);
        say("guest: step %llu %llx %.3f", (unsigned long long)step, (unsigned long long)state, now());
    }
}

// clock SECONDS: the longest that CLOCK_MONOTONIC jumped between two looks at it.
static int clock_gap(double seconds) {
    double start = now(), last = start, gap = 0;
    say("guest: clock started");
    while (last < start + seconds) {
        double t = now();
        if (t - last > gap)
            gap = t - last;
        if (t < last)
            say("guest: problem the clock went back by %f", last - t);
        last = t;
    }
    say("guest: gap %.3f", gap);
    return 0;
}

// touch MIB: has so many MiB of memory and reads them back.
static int touch(uint64_t mib) {
    size_t count = mib << 17;
    uint64_t *memory = mmap(0, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), bad = 0;
    if (memory == MAP_FAILED)
        die("mmap");
    for (size_t i = 0; i < count; i += 512)
        memory[i] = i * 0x9e3779b97f4a7c15u;
    for (size_t i = 0; i < count; i += 512)
        bad += memory[i] != i * 0x9e3779b97f4a7c15u;
    say("guest: touched %llu", (unsigned long long)(mib - (bad ? 1 : 0)));
    return 0;
}

// vsock-connect CID PORT TEXT: says what comes back. vsock-listen PORT: sends back one message in capitals.
static int vsock_connect(unsigned cid, unsigned port, const char *text) {
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm to = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
    char answer[200];
    if (connect(fd, (void *)&to, sizeof to))
        die("connect");
    if (write(fd, text, strlen(text)) < 0)
        die("write");
    ssize_t count = read(fd, answer, sizeof answer - 1);
    if (count < 0)
        die("read");
    answer[count] = 0;
    say("guest: answer %s", answer);
    return 0;
}

static int vsock_listen(unsigned port) {
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    char text[200];
    if (bind(listener, (void *)&at, sizeof at) || listen(listener, 1))
        die("listen");
    say("guest: listening %u", port);
    int fd = accept(listener, 0, 0);
    ssize_t count = read(fd, text, sizeof text);
    for (ssize_t i = 0; i < count; i++)
        if (text[i] >= 'a' && text[i] <= 'z')
            text[i] -= 32;
    if (count < 0 || write(fd, text, count) != count)
        die("vsock");
    return 0;
}

int main(int argc, char **argv) {
    const char *verb = argc > 1 ? argv[1] : "", *a = argc > 2 ? argv[2] : "", *b = argc > 3 ? argv[3] : "0",
               *c = argc > 4 ? argv[4] : "0";
    if (!strcmp(verb, "journal"))
        return journal(a, atoll(b), atoll(c));
    if (!strcmp(verb, "check"))
        return check(a, atoll(b));
    if (!strcmp(verb, "work"))
        work(a, atoll(b));
    if (!strcmp(verb, "clock"))
        return clock_gap(atof(a));
    if (!strcmp(verb, "touch"))
        return touch(atoll(a));
    if (!strcmp(verb, "vsock-connect"))
        return vsock_connect(atoi(a), atoi(b), argc > 4 ? argv[4] : "");
    if (!strcmp(verb, "vsock-listen"))
        return vsock_listen(atoi(a));
    say("guest: problem there is no verb %s", verb);
    return 2;
}
