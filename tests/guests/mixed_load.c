// SPDX-License-Identifier: Apache-2.0
/*
 * A mixed load for a guest of several processors: mixed_load SECONDS [STALL_SECONDS].
 *
 * On every processor a process forks, and threads that share one address space map and unmap memory (which empties
 * other processors' TLBs), hand a futex to and fro across processors, sleep on timers, and read the clock. Wrong is:
 * a clock that goes back, on one processor or from one to the next; a timer that ends before its time; memory that is
 * not what was written; a kind of work that gets nowhere for STALL_SECONDS (default 120). Prints what was done; the
 * status is 1 if something was wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CPUS_MAX 64
#define PAGE 4096

enum { FORK, MAP, FUTEX, TIMER, CLOCK, KINDS };
static const char *const names[KINDS] = {"forks", "maps", "handovers", "timers", "clock readings"};
static _Atomic uint64_t done[KINDS][CPUS_MAX];
static _Atomic uint64_t latest, wrong, worst_ns;
static atomic_int stopping;
static int cpus;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + time.tv_nsec;
}

static void complain(const char *what, uint64_t first, uint64_t second)
{
	wrong++;
	printf("WRONG: %s: %llu, %llu\n", what, (unsigned long long)first, (unsigned long long)second);
	fflush(stdout);
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
}

static void *forks(void *argument)
{
	int cpu = (int)(intptr_t)argument, status;

	pin(cpu);
	while (!stopping) {
		pid_t child = fork();

		if (child == 0) {
			volatile char *page = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE,
						   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

			for (int one = 0; one < 16; one++)
				page[one * PAGE] = (char)one;
			pin((cpu + 1) % cpus);
			_exit(7);
		}
		if (child < 0) {
			complain("fork", errno, 0);
			sleep(1);
			continue;
		}
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			;
		if (!WIFEXITED(status) || WEXITSTATUS(status) != 7)
			complain("status of a child", status, 7);
		done[FORK][cpu]++;
	}
	return NULL;
}

static void *maps(void *argument)
{
	int cpu = (int)(intptr_t)argument;
	unsigned int seed = cpu + 1;

	pin(cpu);
	while (!stopping) {
		size_t pages = 1 + rand_r(&seed) % 256;
		uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (memory == MAP_FAILED) {
			complain("mmap", errno, pages);
			sleep(1);
			continue;
		}
		for (size_t page = 0; page < pages; page++)
			memory[page * (PAGE / 8)] = page * cpus + cpu;
		mprotect(memory, pages * PAGE, PROT_READ);
		for (size_t page = 0; page < pages; page++)
			if (memory[page * (PAGE / 8)] != page * cpus + cpu)
				complain("memory", memory[page * (PAGE / 8)], page * cpus + cpu);
		munmap(memory, pages * PAGE);
		done[MAP][cpu]++;
	}
	return NULL;
}

static struct {
	pthread_mutex_t lock;
	pthread_cond_t turn_changed;
	int turn;
} ring = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0};

static void *futexes(void *argument)
{
	int cpu = (int)(intptr_t)argument;

	pin(cpu);
	pthread_mutex_lock(&ring.lock);
	while (!stopping) {
		while (ring.turn != cpu && !stopping)
			pthread_cond_wait(&ring.turn_changed, &ring.lock);
		ring.turn = (cpu + 1) % cpus;
		done[FUTEX][cpu]++;
		pthread_cond_broadcast(&ring.turn_changed);
	}
	pthread_mutex_unlock(&ring.lock);
	return NULL;
}

static void *timers(void *argument)
{
	int cpu = (int)(intptr_t)argument, timer = timerfd_create(CLOCK_MONOTONIC, 0);
	unsigned int seed = cpu + 100;

	pin(cpu);
	while (!stopping) {
		uint64_t pause = 100000 + rand_r(&seed) % 20000000, before = now(), after, count;
		struct itimerspec wanted = {.it_value = {.tv_sec = 0, .tv_nsec = (long)pause}};

		if (rand_r(&seed) & 1) {
			timerfd_settime(timer, 0, &wanted, NULL);
			if (read(timer, &count, sizeof(count)) != sizeof(count) || count != 1)
				complain("expirations of a timer", count, 1);
		} else {
			clock_nanosleep(CLOCK_MONOTONIC, 0, &wanted.it_value, NULL);
		}
		after = now();
		if (after < before + pause)
			complain("early timer", after - before, pause);
		else if (after - before - pause > worst_ns)
			worst_ns = after - before - pause;
		done[TIMER][cpu]++;
	}
	close(timer);
	return NULL;
}

static void *clocks(void *argument)
{
	int cpu = (int)(intptr_t)argument;

	pin(cpu);
	while (!stopping) {
		for (int one = 0; one < 1000; one++) {
			uint64_t seen = latest, time = now();

			if (time < seen)
				complain("the clock went back", time, seen);
			while (seen < time && !atomic_compare_exchange_weak(&latest, &seen, time))
				;
		}
		done[CLOCK][cpu] += 1000;
		usleep(1000);
	}
	return NULL;
}

int main(int count, char **words)
{
	void *(*const work[KINDS])(void *) = {forks, maps, futexes, timers, clocks};
	unsigned int seconds = count > 1 ? atoi(words[1]) : 10, stall = count > 2 ? atoi(words[2]) : 120;
	uint64_t seen[KINDS][CPUS_MAX], moved[KINDS][CPUS_MAX], end;
	pthread_t threads[KINDS][CPUS_MAX];

	cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
	if (cpus > CPUS_MAX)
		cpus = CPUS_MAX;
	memset(seen, 0xFF, sizeof(seen));
	for (int kind = 0; kind < KINDS; kind++)
		for (int cpu = 0; cpu < cpus; cpu++)
			if (pthread_create(&threads[kind][cpu], NULL, work[kind], (void *)(intptr_t)cpu))
				return 2;
	end = now() + (uint64_t)seconds * 1000000000u;
	while (now() < end) {
		usleep(200000);
		for (int kind = 0; kind < KINDS; kind++)
			for (int cpu = 0; cpu < cpus; cpu++) {
				if (seen[kind][cpu] != done[kind][cpu]) {
					seen[kind][cpu] = done[kind][cpu];
					moved[kind][cpu] = now();
				} else if (now() - moved[kind][cpu] > (uint64_t)stall * 1000000000u) {
					complain(names[kind], cpu, seen[kind][cpu]);
					moved[kind][cpu] = now();
				}
			}
	}
	pthread_mutex_lock(&ring.lock);
	stopping = 1;
	pthread_cond_broadcast(&ring.turn_changed);
	pthread_mutex_unlock(&ring.lock);
	for (int kind = 0; kind < KINDS; kind++) {
		uint64_t sum = 0;

		for (int cpu = 0; cpu < cpus; cpu++) {
			pthread_join(threads[kind][cpu], NULL);
			sum += done[kind][cpu];
		}
		printf("%llu %s, ", (unsigned long long)sum, names[kind]);
	}
	printf("worst lateness %llu us, %llu wrong\n", (unsigned long long)worst_ns / 1000, (unsigned long long)wrong);
	return wrong ? 1 : 0;
}
