/* Signals: from the processor's exceptions, from timers, from kill, on other stacks. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "check.h"

static sigjmp_buf back;
static volatile sig_atomic_t seen, code, ticks;
static void *volatile address;
static volatile uintptr_t stack_at;

static void leave(int number, siginfo_t *info, void *context)
{
	(void)context;
	seen = number;
	code = info->si_code;
	address = info->si_addr;
	stack_at = (uintptr_t)&number;
	siglongjmp(back, 1);
}

static void step_over(int number, siginfo_t *info, void *context)
{
	ucontext_t *at = context;

	(void)info;
	seen = number;
	at->uc_mcontext.gregs[REG_RIP] += 2; /* the length of ud2 */
	at->uc_mcontext.gregs[REG_RBX] = 0x1234567890abcdef;
}

static void trap(int number, siginfo_t *info, void *context)
{
	ucontext_t *at = context;

	(void)info;
	seen = number;
	if (++ticks == 10)
		at->uc_mcontext.gregs[REG_EFL] &= ~0x100; /* TF */
}

static void tick(int number)
{
	seen = number;
	ticks++;
}

static void install(int number, void (*handler)(int, siginfo_t *, void *), int flags)
{
	struct sigaction action = { .sa_sigaction = handler,
				    .sa_flags = SA_SIGINFO | flags };

	sigaction(number, &action, NULL);
	seen = code = ticks = 0;
}

static void faults(void)
{
	uint8_t *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	volatile int zero = 0;

	install(SIGSEGV, leave, 0);
	if (sigsetjmp(back, 1) == 0)
		*(volatile uint8_t *)(page + 123) = 1;
	check("a write to a read-only page", seen == SIGSEGV && code == SEGV_ACCERR);
	check("the faulting address", address == page + 123);

	install(SIGSEGV, leave, 0);
	if (sigsetjmp(back, 1) == 0)
		(void)*(volatile uint8_t *)16;
	check("a read of nothing", seen == SIGSEGV && code == SEGV_MAPERR);

	install(SIGSEGV, leave, 0);
	if (sigsetjmp(back, 1) == 0)
		((void (*)(void))page)();
	check("a jump to data", seen == SIGSEGV && address == page);

	install(SIGSEGV, leave, 0);
	if (sigsetjmp(back, 1) == 0)
		(void)*(volatile uint8_t *)0x8000000000000000;
	check("a non-canonical address", seen == SIGSEGV);

	install(SIGSEGV, leave, 0);
	if (sigsetjmp(back, 1) == 0)
		__asm__ volatile("cli");
	check("a privileged instruction", seen == SIGSEGV);

	install(SIGFPE, leave, 0);
	if (sigsetjmp(back, 1) == 0)
		zero = 100 / zero;
	check("a division by zero", seen == SIGFPE && code == FPE_INTDIV);

	install(SIGTRAP, leave, 0);
	if (sigsetjmp(back, 1) == 0)
		__asm__ volatile("int3");
	check("a breakpoint", seen == SIGTRAP);
}

static void resume(void)
{
	uint64_t changed = 0;

	install(SIGILL, step_over, 0);
	__asm__ volatile("ud2" : "+b"(changed));
	check("an undefined instruction, stepped over", seen == SIGILL);
	check_u64("a register set by the handler", changed, 0x1234567890abcdef);

	install(SIGTRAP, trap, 0);
	__asm__ volatile("pushfq\n\torq $0x100, (%%rsp)\n\tpopfq\n\t"
			 ".rept 20\n\tnop\n\t.endr" ::: "cc", "memory");
	check_u64("single steps", (uint64_t)ticks, 10);
}

static void other_stack(void)
{
	static uint8_t memory[65536];
	stack_t stack = { .ss_sp = memory, .ss_size = sizeof memory };

	sigaltstack(&stack, NULL);
	install(SIGSEGV, leave, SA_ONSTACK);
	if (sigsetjmp(back, 1) == 0)
		*(volatile uint8_t *)8 = 1;
	check("a stack for signals",
	      stack_at > (uintptr_t)memory && stack_at < (uintptr_t)memory + sizeof memory);
}

static void timers(void)
{
	struct itimerval every = { { 0, 10000 }, { 0, 10000 } }, never = { 0 };
	struct timespec start, end, nap = { 0, 50000000 };
	struct sigaction action = { .sa_handler = tick };
	volatile uint64_t spun = 0;
	int64_t elapsed;

	sigaction(SIGALRM, &action, NULL);
	ticks = 0;
	setitimer(ITIMER_REAL, &every, NULL);
	while (ticks < 5)
		spun++;
	setitimer(ITIMER_REAL, &never, NULL);
	check("a timer interrupts a loop", ticks >= 5 && spun > 0);

	clock_gettime(CLOCK_MONOTONIC, &start);
	nanosleep(&nap, NULL);
	clock_gettime(CLOCK_MONOTONIC, &end);
	elapsed = (end.tv_sec - start.tv_sec) * 1000000000 + end.tv_nsec - start.tv_nsec;
	check("sleep takes its time", elapsed >= nap.tv_nsec);
}

static void kills(void)
{
	struct sigaction action = { .sa_handler = tick };
	sigset_t blocked, pending;

	sigaction(SIGUSR1, &action, NULL);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	ticks = 0;
	kill(getpid(), SIGUSR1);
	sigpending(&pending);
	check("a blocked signal waits", ticks == 0 && sigismember(&pending, SIGUSR1));
	sigprocmask(SIG_UNBLOCK, &blocked, NULL);
	check_u64("and comes when unblocked", (uint64_t)ticks, 1);
}

int main(void)
{
	faults();
	resume();
	other_stack();
	timers();
	kills();
	return finish("signals");
}
