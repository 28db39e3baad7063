/* fork, exec, wait, pipes, copy on write and shared memory. */
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

enum { CHILDREN = 20, PAGES = 64, PAGE = 4096, PIPED = 1 << 20 };

static void copy_on_write(void)
{
	volatile uint8_t *private = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
					 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint32_t *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
				MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int status, unchanged = 1, exits = 0;

	for (int i = 0; i < PAGES; i++)
		private[i * PAGE] = (uint8_t)i;
	for (int child = 0; child < CHILDREN; child++) {
		if (fork() == 0) {
			for (int i = 0; i < PAGES; i++)
				private[i * PAGE] = (uint8_t)(i ^ 0xff);
			__atomic_add_fetch(shared, 1, __ATOMIC_SEQ_CST);
			_exit(child);
		}
	}
	for (int child = 0; child < CHILDREN; child++) {
		wait(&status);
		exits += WIFEXITED(status) ? WEXITSTATUS(status) : 1000;
	}
	for (int i = 0; i < PAGES; i++)
		unchanged &= private[i * PAGE] == i;
	check("a child's writes stay its own", unchanged);
	check_u64("children share memory", *shared, CHILDREN);
	check_u64("exit statuses", (uint64_t)exits, CHILDREN * (CHILDREN - 1) / 2);
}

static void pipe_through(void)
{
	static uint8_t buffer[PIPED];
	uint64_t sum = 0, wanted = 0;
	int ends[2], status;
	ssize_t got;

	for (int i = 0; i < PIPED; i++)
		wanted += (uint8_t)(i * 7 + (i >> 8));
	if (pipe(ends) != 0)
		exit(2);
	if (fork() == 0) {
		for (int i = 0; i < PIPED; i++)
			buffer[i] = (uint8_t)(i * 7 + (i >> 8));
		for (size_t at = 0; at < PIPED;)
			at += (size_t)write(ends[1], buffer + at, PIPED - at);
		_exit(0);
	}
	close(ends[1]);
	while ((got = read(ends[0], buffer, sizeof buffer)) > 0)
		for (ssize_t i = 0; i < got; i++)
			sum += buffer[i];
	wait(&status);
	check_u64("a megabyte through a pipe", sum, wanted);
}

static void run_another(void)
{
	int status;

	fflush(stdout);
	if (fork() == 0) {
		execl("/proc/self/exe", "processes", "42", (char *)NULL);
		_exit(1);
	}
	wait(&status);
	check_u64("exec", (uint64_t)WEXITSTATUS(status), 42);
}

int main(int argc, char **argv)
{
	if (argc > 1)
		return atoi(argv[1]);
	copy_on_write();
	pipe_through();
	run_another();
	return finish("processes");
}
