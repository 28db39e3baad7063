/* LD_PRELOAD: the host's disk fails.
 *
 * While the file named by DISKFAULT_SWITCH exists, accesses to the file named by DISKFAULT_IMAGE
 * give the error whose number that file holds: what a bad sector or a full disk gives a program.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>

static int fault(int fd)
{
	const char *control = getenv("DISKFAULT_SWITCH");
	const char *image = getenv("DISKFAULT_IMAGE");
	struct stat here, there;
	int number = 0;
	FILE *file;

	if (!control || !image || fstat(fd, &here) || stat(image, &there))
		return 0;
	if (here.st_dev != there.st_dev || here.st_ino != there.st_ino)
		return 0;
	file = fopen(control, "re");
	if (!file)
		return 0;
	if (fscanf(file, "%d", &number) != 1)
		number = 0;
	fclose(file);
	return number;
}

#define CALL(type, name, parameters, ...)                                      \
	type name parameters                                                   \
	{                                                                      \
		static type(*real) parameters;                                 \
		int number = fault(fd);                                        \
		if (number) {                                                  \
			errno = number;                                        \
			return -1;                                             \
		}                                                              \
		if (!real)                                                     \
			real = (type(*) parameters)dlsym(RTLD_NEXT, #name);    \
		return real(__VA_ARGS__);                                      \
	}

#define VECTORED(name)                                                         \
	CALL(ssize_t, name, (int fd, const struct iovec *v, int n, off_t at),  \
	     fd, v, n, at)
#define VECTORED2(name)                                                        \
	CALL(ssize_t, name,                                                    \
	     (int fd, const struct iovec *v, int n, off_t at, int flags),      \
	     fd, v, n, at, flags)

VECTORED(preadv)
VECTORED(preadv64)
VECTORED(pwritev)
VECTORED(pwritev64)
VECTORED2(preadv2)
VECTORED2(preadv64v2)
VECTORED2(pwritev2)
VECTORED2(pwritev64v2)
CALL(int, fdatasync, (int fd), fd)
CALL(int, fsync, (int fd), fd)
