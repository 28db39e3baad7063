/*
 * TCP with contents that are known, from either end.
 *
 *   stream serve PORT             answer any number of the following
 *   stream put HOST PORT BYTES    send so many, the server says what came
 *   stream get HOST PORT BYTES    receive so many, and compare each
 *   stream many HOST PORT COUNT   so many connections at once, each a small put
 *
 * A connection begins with the number of bytes that the client wants; 0: it sends.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHUNK = 1 << 16, SMALL = 1000, MANY = 4096 };

static uint64_t words[CHUNK / 8];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* The next chunk of what every stream consists of (Marsaglia's xorshift). */
static void generate(uint64_t *state, uint64_t *to, size_t bytes)
{
	uint64_t x = *state;

	for (size_t i = 0; i < (bytes + 7) / 8; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		to[i] = x;
	}
	*state = x;
}

static void send_all(int fd, const void *data, size_t bytes)
{
	const char *at = data;

	while (bytes > 0) {
		ssize_t sent = send(fd, at, bytes, MSG_NOSIGNAL);

		if (sent < 0)
			die("send");
		at += sent;
		bytes -= sent;
	}
}

static size_t receive(int fd, void *data, size_t bytes)
{
	ssize_t got = recv(fd, data, bytes, MSG_WAITALL);

	if (got < 0)
		die("recv");
	return got;
}

static void send_stream(int fd, uint64_t bytes)
{
	uint64_t state = 1;

	while (bytes > 0) {
		size_t part = bytes < CHUNK ? bytes : CHUNK;

		generate(&state, words, part);
		send_all(fd, words, part);
		bytes -= part;
	}
}

/* Receive until the other side ends; the number of bytes that are as they should. */
static uint64_t compare_stream(int fd)
{
	static uint64_t expected[CHUNK / 8];
	uint64_t state = 1, good = 0;

	for (;;) {
		size_t got = receive(fd, words, CHUNK);

		generate(&state, expected, CHUNK);
		if (memcmp(words, expected, got) != 0) {
			fprintf(stderr, "wrong behind %llu bytes\n",
				(unsigned long long)good);
			exit(1);
		}
		good += got;
		if (got < CHUNK)
			return good;
	}
}

static int dial(const char *host, const char *port, uint64_t wanted)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	to.sin_port = htons(atoi(port));
	if (inet_pton(AF_INET, host, &to.sin_addr) != 1) {
		fprintf(stderr, "%s is not an address\n", host);
		exit(1);
	}
	if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0)
		die("connect");
	send_all(fd, &wanted, sizeof(wanted));
	return fd;
}

static void put(int fd, uint64_t bytes)
{
	uint64_t came;

	send_stream(fd, bytes);
	shutdown(fd, SHUT_WR);
	if (receive(fd, &came, sizeof(came)) != sizeof(came) || came != bytes) {
		fprintf(stderr, "the server did not get it\n");
		exit(1);
	}
}

static void serve(const char *port)
{
	struct sockaddr_in at = { .sin_family = AF_INET };
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	at.sin_port = htons(atoi(port));
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (struct sockaddr *)&at, sizeof(at)) < 0 ||
	    listen(listener, MANY) < 0)
		die("listen");
	signal(SIGCHLD, SIG_IGN);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		if (fd < 0 && errno != EINTR)
			die("accept");
		if (fd >= 0 && fork() == 0) {
			uint64_t wanted;

			if (receive(fd, &wanted, sizeof(wanted)) != sizeof(wanted))
				exit(1);
			if (wanted > 0) {
				send_stream(fd, wanted);
			} else {
				uint64_t came = compare_stream(fd);

				send_all(fd, &came, sizeof(came));
			}
			exit(0);
		}
		close(fd);
	}
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	uint64_t number = argc > 4 ? strtoull(argv[4], NULL, 10) : 0;

	if (strcmp(mode, "serve") == 0 && argc == 3) {
		serve(argv[2]);
	} else if (strcmp(mode, "put") == 0 && argc == 5) {
		put(dial(argv[2], argv[3], 0), number);
	} else if (strcmp(mode, "get") == 0 && argc == 5) {
		uint64_t good = compare_stream(dial(argv[2], argv[3], number));

		if (good != number) {
			fprintf(stderr, "only %llu bytes came\n",
				(unsigned long long)good);
			return 1;
		}
	} else if (strcmp(mode, "many") == 0 && argc == 5 && number <= MANY) {
		static int fds[MANY];

		for (uint64_t i = 0; i < number; i++)
			fds[i] = dial(argv[2], argv[3], 0);
		for (uint64_t i = 0; i < number; i++)
			put(fds[i], SMALL + i);
	} else {
		fprintf(stderr, "usage: see the source\n");
		return 2;
	}
	printf("%s %llu: ok\n", mode, (unsigned long long)number);
	return 0;
}
