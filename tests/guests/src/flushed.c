/*
 * flushed DISK [WRITERS]: fills a disk with numbered blocks until it is stopped, and
 * prints "flushed WRITER NUMBER" once fdatasync has promised that block.
 *
 * Each writer has a part of the disk of its own and writes its blocks in order, each
 * once: block NUMBER of a writer is its part's block of that number.  Between two
 * promises it writes several blocks, so that the disk always has work under way.
 *
 * A block: 8 bytes magic, writer, number, CRC-32 of the rest, and the rest.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { BLOCK = 16384, HEADER = 20, PROMISED = 4, MAX_WRITERS = 16 };

static const char *disk;
static uint64_t part_blocks;
static uint32_t crc_table[256];

static uint32_t crc32(const uint8_t *data, size_t size)
{
	uint32_t crc = ~0u;

	while (size--)
		crc = crc >> 8 ^ crc_table[(uint8_t)crc ^ *data++];
	return ~crc;
}

static void make_crc_table(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t value = i;

		for (int bit = 0; bit < 8; bit++)
			value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
		crc_table[i] = value;
	}
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void fill(uint8_t *block, uint32_t writer, uint32_t number)
{
	uint64_t state = (uint64_t)writer << 32 | number;
	uint32_t crc;

	for (size_t at = HEADER; at < BLOCK; at += 4) {
		state = state * 6364136223846793005u + 1442695040888963407u;
		memcpy(block + at, (uint8_t *)&state + 4, 4);
	}
	memcpy(block, "flushed", 8);
	memcpy(block + 8, &writer, 4);
	memcpy(block + 12, &number, 4);
	crc = crc32(block + HEADER, BLOCK - HEADER);
	memcpy(block + 16, &crc, 4);
}

static void *write_part(void *argument)
{
	uint32_t writer = (uint32_t)(uintptr_t)argument;
	int file = open(disk, O_RDWR | O_DIRECT);
	void *block;

	if (file < 0 || posix_memalign(&block, BLOCK, BLOCK))
		die(disk);
	for (uint32_t number = 0; number < part_blocks; number++) {
		off_t at = (off_t)((writer * part_blocks + number) * BLOCK);

		fill(block, writer, number);
		if (pwrite(file, block, BLOCK, at) != BLOCK)
			die("write");
		if (number % PROMISED != PROMISED - 1)
			continue;
		if (fdatasync(file))
			die("fdatasync");
		printf("flushed %" PRIu32 " %" PRIu32 "\n", writer, number);
		fflush(stdout);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[MAX_WRITERS];
	uintptr_t writers = argc > 2 ? strtoul(argv[2], NULL, 0) : 4;
	uint64_t size;
	int file;

	if (argc < 2 || writers < 1 || writers > MAX_WRITERS) {
		fputs("usage: flushed DISK [WRITERS]\n", stderr);
		return 2;
	}
	disk = argv[1];
	file = open(disk, O_RDONLY);
	if (file < 0 || ioctl(file, BLKGETSIZE64, &size))
		die(disk);
	part_blocks = size / BLOCK / writers;
	make_crc_table();
	printf("parts of %" PRIu64 " blocks\n", part_blocks);
	for (uintptr_t writer = 0; writer < writers; writer++)
		if (pthread_create(&threads[writer], NULL, write_part, (void *)writer))
			die("thread");
	for (uintptr_t writer = 0; writer < writers; writer++)
		pthread_join(threads[writer], NULL);
	puts("full");
	return 0;
}
