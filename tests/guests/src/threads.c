/* Threads on all processors: locks, atomics, condition variables, memory order. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"

enum { THREADS = 4, ROUNDS = 20000, TURNS = 2000, ORDER_ROUNDS = 20000 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turned = PTHREAD_COND_INITIALIZER;
static pthread_barrier_t barrier;
static uint64_t locked_count, turn;
static _Atomic uint64_t atomic_count;
static _Alignas(16) unsigned __int128 wide_count;
static __thread uint64_t own;

/* A lock across two cache lines must still be one. */
static _Alignas(64) uint8_t lines[128];
#define SPLIT ((uint64_t *)(lines + 60))

static void *count(void *unused)
{
	(void)unused;
	for (int i = 0; i < ROUNDS; i++) {
		own++;
		atomic_fetch_add(&atomic_count, 1);
		__asm__ volatile("lock incq %0" : "+m"(*SPLIT) : : "cc");
		pthread_mutex_lock(&mutex);
		locked_count++;
		pthread_mutex_unlock(&mutex);
		for (unsigned __int128 old = wide_count;;) {
			uint64_t low = (uint64_t)old, high = (uint64_t)(old >> 64);
			uint8_t done;

			__asm__ volatile("lock cmpxchg16b %1\n\tsetz %0"
					 : "=q"(done), "+m"(wide_count), "+a"(low), "+d"(high)
					 : "b"((uint64_t)(old + 1)),
					   "c"((uint64_t)((old + 1) >> 64))
					 : "cc");
			if (done)
				break;
			old = (unsigned __int128)high << 64 | low;
		}
	}
	return (void *)(uintptr_t)own;
}

static void counting(void)
{
	pthread_t threads[THREADS];
	int owns = 1;

	for (int i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, count, NULL);
	for (int i = 0; i < THREADS; i++) {
		void *result;

		pthread_join(threads[i], &result);
		owns &= (uintptr_t)result == ROUNDS;
	}
	check("thread-local counters", owns);
	check_u64("a mutex", locked_count, THREADS * ROUNDS);
	check_u64("an atomic counter", atomic_count, THREADS * ROUNDS);
	check_u64("a counter over two cache lines", *SPLIT, THREADS * ROUNDS);
	check_u64("a 128-bit counter", (uint64_t)wide_count, THREADS * ROUNDS);
}

static void *take_turns(void *argument)
{
	uint64_t mine = (uintptr_t)argument;

	for (int i = 0; i < TURNS; i++) {
		pthread_mutex_lock(&mutex);
		while (turn % 2 != mine)
			pthread_cond_wait(&turned, &mutex);
		turn++;
		pthread_cond_signal(&turned);
		pthread_mutex_unlock(&mutex);
	}
	return NULL;
}

static void turns(void)
{
	pthread_t threads[2];

	for (uintptr_t i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, take_turns, (void *)i);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	check_u64("turns by condition variable", turn, 2 * TURNS);
}

/* x86 keeps the order of two stores as another processor sees them. */
static volatile uint64_t first, second;

static void *store(void *unused)
{
	(void)unused;
	for (uint64_t i = 1; i <= ORDER_ROUNDS; i++) {
		first = i;
		second = i;
	}
	return NULL;
}

static void order(void)
{
	pthread_t thread;
	int ordered = 1;

	pthread_create(&thread, NULL, store, NULL);
	while (second < ORDER_ROUNDS) {
		uint64_t later = second, earlier = first;

		ordered &= earlier >= later;
	}
	pthread_join(thread, NULL);
	check("stores stay in order", ordered);
}

/* Each of two sees the other's store at least once if both fence (Dekker). */
static volatile int flag[2], saw[2];

static void *dekker(void *argument)
{
	uintptr_t me = (uintptr_t)argument;

	for (int i = 0; i < TURNS; i++) {
		pthread_barrier_wait(&barrier);
		flag[me] = 1;
		atomic_thread_fence(memory_order_seq_cst);
		saw[me] = flag[!me];
		if (pthread_barrier_wait(&barrier) == PTHREAD_BARRIER_SERIAL_THREAD) {
			if (!saw[0] && !saw[1])
				atomic_fetch_add(&atomic_count, 1);
			flag[0] = flag[1] = 0;
		}
	}
	return NULL;
}

static void fences(void)
{
	pthread_t threads[2];

	atomic_count = 0;
	pthread_barrier_init(&barrier, NULL, 2);
	for (uintptr_t i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, dekker, (void *)i);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	check_u64("fences", atomic_count, 0);
}

static void everywhere(void)
{
	long processors = sysconf(_SC_NPROCESSORS_ONLN);
	int all = 1;

	for (int i = 0; i < processors; i++) {
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET(i, &set);
		all &= sched_setaffinity(0, sizeof set, &set) == 0 && sched_getcpu() == i;
	}
	check("runs on each processor", all);
}

int main(void)
{
	counting();
	turns();
	order();
	fences();
	everywhere();
	return finish("threads");
}
