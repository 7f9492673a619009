// SPDX-License-Identifier: Apache-2.0
// Load on a guest's disk and network, one thing a run; also the other end of the network. A static program, which speaks
// in lines "guest: KEY VALUE" as the guest's init does. Disks are read and written past the cache, one request at a time:
// what a request costs is to be seen, not how many a disk takes at once.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/socket.h>
#include "guest_program.h"

enum { PIECE = 1 << 20 };

// How long each thing took, in microseconds; the middle of that is said with KEY-us.
enum { MOST = 1 << 20 };
static float *times;
static size_t timed;

static void note(double seconds) {
    if (!times)
        times = aligned(MOST * sizeof *times);
    if (timed < MOST)
        times[timed++] = seconds * 1e6;
}

static int less(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double middle(void) {
    qsort(times, timed, sizeof *times, less);
    return times[timed / 2];
}

// disk DEVICE read|write BYTES SECONDS [random]: requests past the cache, one at a time; how many in the time.
static int disk(const char *device, int writes, size_t size, double seconds, int random) {
    int fd = open(device, (writes ? O_RDWR : O_RDONLY) | O_DIRECT);
    void *data = aligned(size);
    if (fd < 0)
        die(device);
    off_t end = lseek(fd, 0, SEEK_END), at = 0;
    uint64_t count = 0, state = 88172645463325252u;
    double start = now(), spent = 0, before;
    memset(data, 0x5a, size);
    do {
        before = spent;
        ssize_t done = writes ? pwrite(fd, data, size, at) : pread(fd, data, size, at);
        if (done != (ssize_t)size)
            die("disk");
        count++;
        at = random ? (off_t)(next(&state) % (end / size) * size) : at + 2 * (off_t)size <= end ? at + (off_t)size : 0;
        spent = now() - start;
        note(spent - before);
    } while (spent < seconds);
    const char *order = random ? "random-" : "", *what = writes ? "write" : "read";
    say("guest: %s%s%zu %.1f", order, what, size, count / spent);
    say("guest: %s%s%zu-us %.1f", order, what, size, middle());
    return 0;
}

static int tcp(const char *address, int port) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_aton(address, &to.sin_addr);
    if (connect(fd, (void *)&to, sizeof to))
        die("connect");
    return fd;
}

// send ADDRESS PORT SECONDS, receive ADDRESS PORT SECONDS: MB/s of one TCP connection, as the guest sees it.
static int stream(const char *address, int port, double seconds, int sends) {
    int fd = tcp(address, port);
    char *data = aligned(PIECE);
    data[0] = sends ? 'R' : 'S';
    if (write(fd, data, 1) != 1)
        die("write");
    double start = now(), spent;
    uint64_t bytes = 0;
    do {
        ssize_t done = sends ? write(fd, data, PIECE) : read(fd, data, PIECE);
        if (done <= 0)
            die("stream");
        bytes += done;
        spent = now() - start;
    } while (spent < seconds);
    say("guest: %s %.2f", sends ? "send" : "receive", bytes / spent / 1e6);
    return 0;
}

// echo ADDRESS PORT SECONDS: round trips of one byte in a second.
static int echo(const char *address, int port, double seconds) {
    int fd = tcp(address, port);
    char byte = 'E';
    double start = now(), spent = 0, before;
    uint64_t count = 0;
    do {
        before = spent;
        if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
            die("echo");
        count++;
        spent = now() - start;
        note(spent - before);
    } while (spent < seconds);
    say("guest: echo %.1f", count / spent);
    say("guest: echo-us %.1f", middle());
    return 0;
}

// serve PORT: the other end of these, for ever. The first byte says what the client does.
static int serve(int port) {
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    char *data = aligned(PIECE);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&at, sizeof at) || listen(listener, 16))
        die("listen");
    say("guest: serving %d", port);
    for (;;) {
        int fd = accept(listener, 0, 0);
        if (fork() == 0) {
            char what;
            if (read(fd, &what, 1) != 1)
                _exit(0);
            if (what == 'E')
                do
                    if (write(fd, &what, 1) != 1)
                        break;
                while (read(fd, &what, 1) == 1);
            else if (what == 'R')
                while (read(fd, data, PIECE) > 0) {}
            else
                while (send(fd, data, PIECE, MSG_NOSIGNAL) > 0) {}
            _exit(0);
        }
        close(fd);
    }
}

int main(int argc, char **argv) {
    const char *verb = argc > 1 ? argv[1] : "", *a = argc > 2 ? argv[2] : "", *b = argc > 3 ? argv[3] : "0",
               *c = argc > 4 ? argv[4] : "0", *d = argc > 5 ? argv[5] : "0";
    if (!strcmp(verb, "disk"))
        return disk(a, *b == 'w', atoll(c), atof(d), argc > 6);
    if (!strcmp(verb, "send") || !strcmp(verb, "receive"))
        return stream(a, atoi(b), atof(c), *verb == 's');
    if (!strcmp(verb, "echo"))
        return echo(a, atoi(b), atof(c));
    if (!strcmp(verb, "serve"))
        return serve(atoi(a));
    say("guest: problem there is no verb %s", verb);
    return 2;
}
