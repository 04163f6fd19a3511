/* Plays sequences of calls on /dev/iommu and prints every answer; see program.py for the file it reads.
 *
 * The same static binary runs on a real kernel and under `iommufd run`, so what it prints can be compared byte for byte:
 * memory lies at fixed addresses, descriptors are named by slot and blanked in the structs, and pages that follow each
 * other in the arena never do so physically (checked through /proc/self/pagemap where that can be read), because physical
 * contiguity is nothing two systems agree on. A second process takes one step at a time, while the first waits for it;
 * it has the descriptors of the moment it was forked, and memory of its own at the same addresses.
 *
 * usage: player FILE [FIRST [COUNT]]
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/capability.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ARENA 0x100000000000ULL
#define PAGES 256
#define SCRATCH (ARENA + PAGES * 4096ULL) /* structs are put here, behind the pages a program may map */
#define READ_ONLY (SCRATCH + 32768) /* or here, when the kernel must not be able to answer */
#define SLOTS 64
#define NONE 255

enum {
	IOCTL, OPEN, CLOSE, READ, WRITE, POLL, POKE, PEEK, MMAP, MUNMAP, MPROTECT, MEMFD, LIMIT, FORK, EXIT,
	STATUS, SECOND
};

static const unsigned char *at;
static int slots[SLOTS];
static int pagemap = -1;
static bool limited;
static pid_t second;     /* the second process, 0 when there is none */
static int to_second = -1, from_second = -1;

static uint8_t u8(void) { return *at++; }
static uint16_t u16(void) { uint16_t v; memcpy(&v, at, 2); at += 2; return v; }
static uint32_t u32(void) { uint32_t v; memcpy(&v, at, 4); at += 4; return v; }
static uint64_t u64(void) { uint64_t v; memcpy(&v, at, 8); at += 8; return v; }

static void answer(long result) { if (result < 0) printf("E%d", errno); else printf("%ld", result); }
static void hex(const unsigned char *p, size_t n) { putchar(' '); while (n--) printf("%02x", *p++); }

static uint64_t frame(uint64_t va)
{
	uint64_t entry = 0;

	if (pagemap < 0 || pread(pagemap, &entry, 8, va / 4096 * 8) != 8)
		return 0;
	return entry & ((1ULL << 55) - 1);
}

/* Writes to pages [first, first+n), every other one first, until no two neighbours are physically consecutive. */
static void touch(unsigned first, unsigned n)
{
	for (unsigned half = 0; half < 2; half++)
		for (unsigned i = first + half; i < first + n; i += 2)
			*(volatile char *)(ARENA + i * 4096ULL) = 0;
	for (int round = 0; round < 50; round++) {
		int bad = 0;

		for (unsigned i = first ? first : 1; i < first + n && i < PAGES; i++) {
			uint64_t a = frame(ARENA + (i - 1) * 4096ULL), b = frame(ARENA + i * 4096ULL);

			if (a && b && a + 1 == b) {
				void *keep = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

				madvise((void *)(ARENA + i * 4096ULL), 4096, MADV_DONTNEED);
				*(volatile char *)keep = 1; /* takes the frame just given back */
				*(volatile char *)(ARENA + i * 4096ULL) = 0;
				bad = 1;
			}
		}
		if (!bad)
			break;
	}
}

static void fresh(unsigned first, unsigned n)
{
	mmap((void *)(ARENA + first * 4096ULL), n * 4096ULL, PROT_READ | PROT_WRITE,
	     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	madvise((void *)(ARENA + first * 4096ULL), n * 4096ULL, MADV_NOHUGEPAGE);
	/* no fork makes these pages shared for a while: what a pin then does to them depends on the kernel's moment */
	madvise((void *)(ARENA + first * 4096ULL), n * 4096ULL, MADV_DONTFORK);
	touch(first, n);
}

/* The open descriptors, but for the one this takes. */
static unsigned numbers(int *found, unsigned room)
{
	DIR *folder = opendir("/proc/self/fd");
	struct dirent *entry;
	unsigned n = 0;

	while (folder && (entry = readdir(folder)) && n < room)
		if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(folder))
			found[n++] = atoi(entry->d_name);
	if (folder)
		closedir(folder);
	return n;
}

/* The descriptor that is open and not among the `n` of before; -1 when there is none. */
static int new_number(const int *before, unsigned n)
{
	int now[256];
	unsigned count = numbers(now, 256);

	for (unsigned i = 0; i < count; i++) {
		unsigned j = 0;

		while (j < n && before[j] != now[i])
			j++;
		if (j == n)
			return now[i];
	}
	return -1;
}

static void step_ioctl(void)
{
	int fd = slots[u8()];
	unsigned out_slot = u8(), out_offset = u8(), patches = u8();
	unsigned offsets[8];
	uint32_t cmd = u32();
	unsigned long arg;
	unsigned char *data = (unsigned char *)SCRATCH;
	unsigned length, before_count = 0;
	int before[256];
	bool read_only;
	long result;

	for (unsigned i = 0; i < patches; i++)
		offsets[i] = u16();
	length = u16();
	arg = SCRATCH;
	read_only = length != 0xffff && length & 0x8000;
	if (length == 0xffff) {
		arg = u64();
		length = 0;
	} else {
		length &= 0x7fff;
		if (read_only) {
			arg = READ_ONLY;
			data = (unsigned char *)READ_ONLY;
		}
		memcpy(data, at, length);
		at += length;
	}
	for (unsigned i = 0; i < patches; i++) {
		int value = slots[offsets[i] >> 8];

		memcpy(data + (offsets[i] & 255), &value, 4);
	}
	if (out_slot != NONE && out_offset == NONE)
		before_count = numbers(before, 256);
	if (read_only)
		mprotect(data, 4096, PROT_READ);
	result = ioctl(fd, cmd, arg);
	if (read_only) {
		int failed = errno;

		mprotect(data, 4096, PROT_READ | PROT_WRITE);
		errno = failed;
	}
	if (result >= 0 && out_slot != NONE) {
		int value;

		if (out_offset == NONE) {
			value = new_number(before, before_count);
		} else {
			memcpy(&value, data + out_offset, 4);
			memset(data + out_offset, 0, 4);
		}
		slots[out_slot] = value;
	}
	answer(result);
	for (unsigned i = 0; i < patches; i++)
		memset(data + (offsets[i] & 255), 0, 4);
	hex(data, length);
}

/* All permitted capabilities are effective from now on, or none is. */
static void capabilities(bool effective)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct sets[2] = { 0 };

	syscall(SYS_capget, &head, sets);
	for (int i = 0; i < 2; i++)
		sets[i].effective = effective ? sets[i].permitted : 0;
	syscall(SYS_capset, &head, sets);
}

/* From here on an ordinary user's lot: no capabilities, and so much memory to lock. */
static void limit(unsigned pages)
{
	struct rlimit memory = { pages * 4096UL, pages * 4096UL };

	setrlimit(RLIMIT_MEMLOCK, &memory);
	capabilities(false);
	limited = true;
}

/* Memory where the program has it, looked at by who may. */
static void furnish(void)
{
	mmap((void *)SCRATCH, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	memset((void *)SCRATCH, 0, 65536);
	capabilities(true);
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (limited)
		capabilities(false);
	fresh(0, PAGES);
}

/* What the process is said to have locked and pinned, in kB. */
static void status(void)
{
	FILE *file = fopen("/proc/self/status", "r");
	char line[256];

	while (file && fgets(line, sizeof(line), file))
		if (!strncmp(line, "VmLck:", 6) || !strncmp(line, "VmPin:", 6))
			printf("%llu ", strtoull(line + 6, NULL, 10));
	if (file)
		fclose(file);
}

static void step(void);

/* The life of the second process: steps, by where they lie in the file, and what they answered. */
static void serve(int orders, int answers)
{
	char *text;
	size_t length;

	fclose(stdout);
	stdout = open_memstream(&text, &length);
	furnish();
	do {
		fflush(stdout);
		if (write(answers, &length, sizeof(length)) < 0 || write(answers, text, length) < 0)
			break;
		rewind(stdout);
		if (read(orders, &at, sizeof(at)) != sizeof(at))
			break;
		step();
	} while (true);
	_exit(0);
}

/* Prints what the second process says. */
static void hear(void)
{
	size_t length = 0;
	char text[4096];

	if (read(from_second, &length, sizeof(length)) != sizeof(length))
		printf("died");
	while (length) {
		ssize_t n = read(from_second, text, length < sizeof(text) ? length : sizeof(text));

		if (n <= 0)
			break;
		fwrite(text, 1, n, stdout);
		length -= n;
	}
}

static void fork_second(void)
{
	int orders[2], answers[2];

	if (pipe(orders) || pipe(answers))
		_exit(2);
	fflush(stdout);
	second = fork();
	if (!second) {
		close(orders[1]);
		close(answers[0]);
		serve(orders[0], answers[1]);
	}
	close(orders[0]);
	close(answers[1]);
	to_second = orders[1];
	from_second = answers[0];
	hear();
}

static void end_second(void)
{
	int status;

	if (second <= 0)
		return;
	close(to_second);
	close(from_second);
	waitpid(second, &status, 0);
	second = 0;
}

static void step(void)
{
	static unsigned char buffer[65536];
	unsigned slot, first, n, length;
	uint64_t where;
	long result;

	switch (u8()) {
	case IOCTL:
		step_ioctl();
		break;
	case OPEN:
		slot = u8();
		slots[slot] = open("/dev/iommu", O_RDWR);
		answer(slots[slot] < 0 ? -1 : 0);
		break;
	case CLOSE:
		slot = u8();
		answer(close(slots[slot]));
		slots[slot] = -1;
		break;
	case READ:
		slot = u8();
		length = u16();
		result = read(slots[slot], buffer, length);
		answer(result);
		hex(buffer, result > 0 ? result : 0);
		break;
	case WRITE:
		slot = u8();
		length = u16();
		answer(write(slots[slot], at, length));
		at += length;
		break;
	case POLL: {
		struct pollfd p = { .fd = slots[u8()], .events = POLLIN | POLLOUT | POLLRDNORM };

		result = poll(&p, 1, 0);
		answer(result < 0 ? -1 : p.revents);
		break;
	}
	case POKE:
		where = u64();
		length = u16();
		memcpy((void *)where, at, length);
		at += length;
		break;
	case PEEK:
		where = u64();
		length = u16();
		hex((void *)where, length);
		break;
	case MMAP:
		first = u8();
		n = u8();
		slot = u8();
		if (slot == NONE)
			fresh(first, n);
		else
			answer(mmap((void *)(ARENA + first * 4096ULL), n * 4096ULL, PROT_READ | PROT_WRITE,
				    MAP_SHARED | MAP_FIXED, slots[slot], 0) == MAP_FAILED ? -1 : 0);
		break;
	case MUNMAP:
		first = u8();
		n = u8();
		answer(munmap((void *)(ARENA + first * 4096ULL), n * 4096ULL));
		break;
	case MPROTECT:
		first = u8();
		n = u8();
		answer(mprotect((void *)(ARENA + first * 4096ULL), n * 4096ULL, u8()));
		break;
	case MEMFD:
		slot = u8();
		slots[slot] = memfd_create("fuzz", MFD_CLOEXEC);
		answer(ftruncate(slots[slot], u16() * 4096L));
		break;
	case LIMIT:
		limit(u16());
		break;
	case FORK:
		end_second();
		fork_second();
		break;
	case EXIT:
		end_second();
		break;
	case STATUS:
		status();
		break;
	case SECOND:
		length = u16();
		if (second && write(to_second, &at, sizeof(at)) == sizeof(at))
			hear();
		at += length;
		break;
	}
}

static void play(uint32_t seed, unsigned steps)
{
	furnish();
	for (int i = 0; i < SLOTS; i++)
		slots[i] = -1;
	printf("sequence %u\n", seed);
	for (unsigned i = 0; i < steps; i++) {
		printf("%u: ", i);
		step();
		putchar('\n');
	}
	end_second();
	fflush(stdout);
	_exit(0);
}

int main(int argc, char **argv)
{
	int fd = open(argv[1], O_RDONLY);
	unsigned first = argc > 2 ? atoi(argv[2]) : 0, count = argc > 3 ? atoi(argv[3]) : ~0u;
	struct stat status;
	unsigned sequences;

	if (fd < 0 || fstat(fd, &status) < 0) {
		perror(argv[1]);
		return 1;
	}
	at = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	at += 8; /* magic */
	sequences = u32();
	for (unsigned i = 0; i < sequences; i++) {
		uint32_t seed = u32(), bytes = u32(), steps = u32();

		if (i >= first && i - first < count) {
			int status;
			pid_t child;

			fflush(stdout);
			child = fork();
			if (child == 0)
				play(seed, steps);
			waitpid(child, &status, 0);
			if (status)
				printf("died %d\n", status);
		}
		at += bytes;
	}
	return 0;
}
