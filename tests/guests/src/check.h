/* One line a check, "PASS what" or "FAIL what: got, wanted", and a count at the end. */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int failures;

static inline void check(const char *what, int ok)
{
	printf("%s %s\n", ok ? "PASS" : "FAIL", what);
	failures += !ok;
}

static inline void check_u64(const char *what, uint64_t got, uint64_t wanted)
{
	if (got == wanted)
		printf("PASS %s\n", what);
	else
		printf("FAIL %s: got %#llx, wanted %#llx\n", what,
		       (unsigned long long)got, (unsigned long long)wanted);
	failures += got != wanted;
}

static inline void check_bytes(const char *what, const void *got, const void *wanted,
			       size_t size)
{
	check(what, memcmp(got, wanted, size) == 0);
}

static inline int finish(const char *name)
{
	printf("DONE %s: %d failed\n", name, failures);
	return failures != 0;
}

#endif
