/*
 * What a program pays per ioctl, measured in the program: the median over rounds, in nanoseconds.
 *
 *	loop call [N]		any 40-byte ioctl (IOAS_MAP's number), for the floor supervisor
 *	loop alloc [N]		IOAS_ALLOC and DESTROY
 *	loop map [N]		IOAS_MAP and IOAS_UNMAP of 4 KiB, fixed IOVA, no domain
 *	loop map-domain [N]	the same with a mock domain (machine mock)
 *	loop map-large [N]	256 MiB and 4 KiB with a mock domain
 *	loop map-areas N M	MAP fixed and automatic of 4 KiB with N live areas, M times; then the supervisor's RssAnon
 *	loop map-areas-domain N M	the same with a mock domain
 *	loop dirty GIB		GET_DIRTY_BITMAP of GIB GiB in pages of 4 KiB, one in a hundred dirty, and memcpy of its bitmap
 *	loop rw [N]		ACCESS_RW of 1 MiB each way, and process_vm_readv + process_vm_writev of as much
 *	loop memory [N]		what pin tracking costs: small and large malloc, touch and MADV_DONTNEED
 *
 * Each line of the output is a name and a number. No header of the uAPI is needed to build it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NR(n) (0x3b00 | (n))
#define DESTROY NR(0x80)
#define IOAS_ALLOC NR(0x81)
#define IOAS_MAP NR(0x85)
#define IOAS_UNMAP NR(0x86)
#define OPTION NR(0x87)
#define HWPT_ALLOC NR(0x89)
#define SET_DIRTY NR(0x8b)
#define GET_DIRTY NR(0x8c)
#define TEST_CMD NR(0xa0)
#define FIXED_IOVA 1
#define READABLE 4
#define WRITEABLE 2
#define ROUNDS 31

struct destroy { uint32_t size, id; };
struct ioas_alloc { uint32_t size, flags, out_ioas_id; };
struct ioas_map { uint32_t size, flags, ioas_id, reserved; uint64_t user_va, length, iova; };
struct ioas_unmap { uint32_t size, ioas_id; uint64_t iova, length; };
struct mock_domain { uint32_t size, op, id, reserved, out_stdev, out_hwpt, out_idev, pad[9]; uint32_t last, tail; };

struct option { uint32_t size, id; uint16_t op, reserved; uint32_t object; uint64_t value; };
struct hwpt_alloc { uint32_t size, flags, dev, pt, out, reserved, type, length; uint64_t data; uint32_t fault, tail; };
struct set_dirty { uint32_t size, flags, hwpt, reserved; };
struct get_dirty { uint32_t size, hwpt, flags, reserved; uint64_t iova, length, page, data; };
struct mark_dirty { uint32_t size, op, id, reserved, flags, pad; uint64_t iova, length, page, bits, out; uint32_t last, tail; };
struct access { uint32_t size, op, id, reserved, out_fd, flags, pad[10]; uint32_t last, tail; };
struct access_rw { uint32_t size, op, id, reserved; uint64_t iova, length, va; uint32_t flags, pad[5]; uint32_t last, tail; };

static int fd;

static void fail(const char *what)
{
	fprintf(stderr, "loop: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(double *values, int count)
{
	qsort(values, count, sizeof(*values), compare);
	return values[count / 2];
}

static uint32_t alloc(void)
{
	struct ioas_alloc cmd = { .size = sizeof(cmd) };

	if (ioctl(fd, IOAS_ALLOC, &cmd))
		fail("IOAS_ALLOC");
	return cmd.out_ioas_id;
}

static void destroy(uint32_t id)
{
	struct destroy cmd = { .size = sizeof(cmd), .id = id };

	if (ioctl(fd, DESTROY, &cmd))
		fail("DESTROY");
}

static uint64_t map(uint32_t ioas, void *va, uint64_t length, uint64_t iova, int fixed)
{
	struct ioas_map cmd = {
		.size = sizeof(cmd), .flags = READABLE | WRITEABLE | (fixed ? FIXED_IOVA : 0), .ioas_id = ioas,
		.user_va = (uintptr_t)va, .length = length, .iova = iova,
	};

	if (ioctl(fd, IOAS_MAP, &cmd))
		fail("IOAS_MAP");
	return cmd.iova;
}

static void unmap(uint32_t ioas, uint64_t iova, uint64_t length)
{
	struct ioas_unmap cmd = { .size = sizeof(cmd), .ioas_id = ioas, .iova = iova, .length = length };

	if (ioctl(fd, IOAS_UNMAP, &cmd))
		fail("IOAS_UNMAP");
}

static uint32_t attach_mock(uint32_t ioas)
{
	struct mock_domain cmd = { .size = sizeof(cmd), .op = 2, .id = ioas };

	if (ioctl(fd, TEST_CMD, &cmd))
		fail("a mock domain (is this machine mock?)");
	return cmd.out_idev;
}

static void *memory(uint64_t length)
{
	void *va = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (va == MAP_FAILED)
		fail("mmap");
	memset(va, 1, length < 65536 ? length : 65536);
	return va;
}

static void calls(long n)
{
	struct ioas_map cmd = { .size = sizeof(cmd) };
	double each[ROUNDS];

	for (int r = 0; r < ROUNDS; r++) {
		uint64_t start = now();

		for (long i = 0; i < n; i++)
			ioctl(fd, IOAS_MAP, &cmd);
		each[r] = (double)(now() - start) / n;
	}
	printf("call %.0f\n", median(each, ROUNDS));
}

static void allocs(long n)
{
	uint32_t *ids = calloc(n, sizeof(*ids));
	double made[ROUNDS], gone[ROUNDS];

	for (int r = 0; r < ROUNDS; r++) {
		uint64_t start = now(), between;

		for (long i = 0; i < n; i++)
			ids[i] = alloc();
		between = now();
		for (long i = 0; i < n; i++)
			destroy(ids[i]);
		made[r] = (double)(between - start) / n;
		gone[r] = (double)(now() - between) / n;
	}
	printf("alloc %.0f\ndestroy %.0f\n", median(made, ROUNDS), median(gone, ROUNDS));
}

static void maps(long n, int domain)
{
	double mapped[ROUNDS], unmapped[ROUNDS];
	uint32_t ioas = alloc();
	char *va = memory(n * 4096);
	uint64_t base = 0x1000000;

	if (domain)
		attach_mock(ioas);
	for (int r = 0; r < ROUNDS; r++) {
		uint64_t start = now(), between;

		for (long i = 0; i < n; i++)
			map(ioas, va + i * 4096, 4096, base + i * 4096, 1);
		between = now();
		for (long i = 0; i < n; i++)
			unmap(ioas, base + i * 4096, 4096);
		mapped[r] = (double)(between - start) / n;
		unmapped[r] = (double)(now() - between) / n;
	}
	printf("map%s %.0f\n", domain ? "-domain" : "", median(mapped, ROUNDS));
	printf("unmap%s %.0f\n", domain ? "-domain" : "", median(unmapped, ROUNDS));
}

static void large(long n)
{
	static const struct { const char *name; uint64_t length; } sizes[] = { { "4k", 4096 }, { "256m", 256 << 20 } };
	uint32_t ioas = alloc();
	char *va = memory(256 << 20);

	attach_mock(ioas);
	for (int s = 0; s < 2; s++) {
		double mapped[ROUNDS], unmapped[ROUNDS];

		for (int r = 0; r < ROUNDS; r++) {
			uint64_t in = 0, out = 0, start;

			for (long i = 0; i < n; i++) {
				start = now();
				map(ioas, va, sizes[s].length, 0x1000000, 1);
				in += now() - start;
				start = now();
				unmap(ioas, 0x1000000, sizes[s].length);
				out += now() - start;
			}
			mapped[r] = (double)in / n;
			unmapped[r] = (double)out / n;
		}
		printf("map-%s %.0f\nunmap-%s %.0f\n", sizes[s].name, median(mapped, ROUNDS), sizes[s].name,
		       median(unmapped, ROUNDS));
	}
}

static long supervisor_kb(void)
{
	char path[64], line[256];
	long kb = -1;
	FILE *status;

	snprintf(path, sizeof(path), "/proc/%d/status", getppid());
	status = fopen(path, "r");
	while (status && fgets(line, sizeof(line), status))
		if (!strncmp(line, "RssAnon:", 8))
			kb = atol(line + 8);
	if (status)
		fclose(status);
	return kb;
}

static void areas(long live, long n, int domain)
{
	uint32_t ioas = alloc();
	char *va = memory(4096 * 16);
	double fixed[ROUNDS], automatic[ROUNDS];
	/* a gap after every area, so that none can be joined; within the mock's aperture when there is a domain */
	uint64_t base = 0x1000000, stride = domain ? 0x800 : 0x10000, length = domain ? 0x800 : 4096;
	uint64_t holes = domain ? 0 : 0x8000;
	long before;

	if (domain)
		attach_mock(ioas);
	before = supervisor_kb();
	for (long i = 0; i < live; i++)
		map(ioas, va + (i & 7) * 4096, length, base + i * stride, 1);
	printf("bytes-per-area %.0f\n", (supervisor_kb() - before) * 1024.0 / live);
	for (int r = 0; r < ROUNDS; r++) {
		uint64_t in = 0, start;

		for (long i = 0; i < n; i++) {
			/* spread over the live areas */
			uint64_t at = (uint64_t)(i * 7919 + r * 104729) % live;
			uint64_t iova = domain ? base + live * stride + 0x100000 : base + at * stride + holes;

			start = now();
			map(ioas, va, length, iova, 1);
			in += now() - start;
			unmap(ioas, iova, length);
		}
		fixed[r] = (double)in / n;
		in = 0;
		for (long i = 0; i < n; i++) {
			uint64_t iova;

			start = now();
			iova = map(ioas, va, length, 0, 0);
			in += now() - start;
			unmap(ioas, iova, length);
		}
		automatic[r] = (double)in / n;
	}
	printf("map-fixed %.0f\nmap-automatic %.0f\n", median(fixed, ROUNDS), median(automatic, ROUNDS));
}

static void heap(long n)
{
	double small[ROUNDS], big[ROUNDS], given[ROUNDS];
	char *va = memory(65536);

	for (int r = 0; r < ROUNDS; r++) {
		uint64_t start = now();

		for (long i = 0; i < n; i++) {
			volatile char *p = malloc(64);

			*p = 1;
			free((void *)p);
		}
		small[r] = (double)(now() - start) / n;
		start = now();
		for (long i = 0; i < n; i++) {
			volatile char *p = mmap(NULL, 2 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

			*p = 1;
			munmap((void *)p, 2 << 20);
		}
		big[r] = (double)(now() - start) / n;
		start = now();
		for (long i = 0; i < n; i++) {
			*(volatile char *)va = 1;
			madvise(va, 4096, MADV_DONTNEED);
		}
		given[r] = (double)(now() - start) / n;
	}
	printf("malloc-small %.0f\nmmap-2m %.0f\ntouch-dontneed %.0f\n", median(small, ROUNDS), median(big, ROUNDS),
	       median(given, ROUNDS));
}

/* A page table of the mock's large format (4 KiB pages, 256 GiB of IOVAs) that tracks what is dirty. */
static uint32_t tracking(uint32_t ioas, uint32_t dev)
{
	uint32_t data[2] = { 0, 1 };
	struct hwpt_alloc cmd = { .size = sizeof(cmd), .flags = 2, .dev = dev, .pt = ioas, .type = 0xdead,
				  .length = sizeof(data), .data = (uintptr_t)data };
	struct set_dirty on = { .size = sizeof(on), .flags = 1 };

	if (ioctl(fd, HWPT_ALLOC, &cmd))
		fail("HWPT_ALLOC");
	on.hwpt = cmd.out;
	if (ioctl(fd, SET_DIRTY, &on))
		fail("SET_DIRTY_TRACKING");
	return cmd.out;
}

static void dirty(uint64_t gib)
{
	enum { PIECE = 1 << 17 };	/* pages marked at a time */
	struct option small = { .size = sizeof(small), .id = 1, .op = 0 };
	uint64_t length = gib << 30, pages = length >> 12, bytes = pages / 8;
	uint32_t spare = alloc(), ioas = alloc(), hwpt;
	unsigned char *bits = memory(bytes), *copy = memory(bytes), *marks = memory(PIECE / 8);
	double got[9], kept[9], copied[9];
	unsigned int seed = 1;
	char *va;

	va = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (va == MAP_FAILED)
		fail("mmap");
	small.object = ioas;
	if (ioctl(fd, OPTION, &small))
		fail("OPTION");
	hwpt = tracking(ioas, attach_mock(spare));
	map(ioas, va, length, 0, 1);
	memset(bits, 0, bytes);
	memset(copy, 0, bytes);
	for (int r = 0; r < 9; r++) {
		struct get_dirty get = { .size = sizeof(get), .hwpt = hwpt, .flags = 1, .length = length, .page = 4096,
					 .data = (uintptr_t)bits };
		uint64_t found = 0, start;

		for (uint64_t at = 0; at < pages; at += PIECE) {
			struct mark_dirty mark = { .size = sizeof(mark), .op = 13, .id = hwpt, .iova = at << 12,
						   .length = (uint64_t)PIECE << 12, .page = 4096,
						   .bits = (uintptr_t)marks };

			memset(marks, 0, PIECE / 8);
			for (int i = 0; i < PIECE / 100; i++) {
				uint32_t page = rand_r(&seed) % PIECE;

				marks[page / 8] |= 1 << page % 8;
			}
			if (ioctl(fd, TEST_CMD, &mark))
				fail("DIRTY");
		}
		start = now();
		if (ioctl(fd, GET_DIRTY, &get))
			fail("GET_DIRTY_BITMAP without clearing");
		kept[r] = now() - start;
		memset(bits, 0, bytes);
		get.flags = 0;
		start = now();
		if (ioctl(fd, GET_DIRTY, &get))
			fail("GET_DIRTY_BITMAP");
		got[r] = now() - start;
		for (uint64_t i = 0; i < bytes; i++)
			found += __builtin_popcount(bits[i]);
		if (found < pages / 100 * 98 / 100 || found > pages / 100) {
			fprintf(stderr, "loop: %lu dirty pages are not one in a hundred of %lu\n", found, pages);
			exit(1);
		}
		start = now();
		memcpy(copy, bits, bytes);
		__asm__ volatile("" : : "r"(copy) : "memory");
		copied[r] = now() - start;
		memset(bits, 0, bytes);
	}
	printf("get-dirty %.0f\nget-dirty-no-clear %.0f\nmemcpy %.0f\n", median(got, 9), median(kept, 9),
	       median(copied, 9));
}

static void rw(long n)
{
	enum { LENGTH = 1 << 20 };
	uint32_t ioas = alloc();
	char *device = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *buffer = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *between = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct access make = { .size = sizeof(make), .op = 5, .id = ioas };
	double in[ROUNDS], out[ROUNDS], moved[ROUNDS];
	int both[2];
	pid_t child;
	char byte;

	if (device == MAP_FAILED || buffer == MAP_FAILED || between == MAP_FAILED || pipe(both))
		fail("mmap or pipe");
	memset(device, 1, LENGTH);
	memset(buffer, 2, LENGTH);
	memset(between, 3, LENGTH);
	child = fork();
	if (child == 0) {
		close(both[1]);
		memset(device, 4, LENGTH);	/* its own pages */
		memset(buffer, 5, LENGTH);
		_exit(read(both[0], &byte, 1) < 0);
	}
	attach_mock(ioas);
	map(ioas, device, LENGTH, 0x1000000, 1);
	if (ioctl(fd, TEST_CMD, &make))
		fail("CREATE_ACCESS");
	for (int r = 0; r < ROUNDS; r++) {
		struct access_rw cmd = { .size = sizeof(cmd), .op = 8, .id = make.out_fd, .iova = 0x1000000,
					 .length = LENGTH, .va = (uintptr_t)buffer };
		struct iovec ours = { between, LENGTH }, from = { device, LENGTH }, to = { buffer, LENGTH };
		uint64_t start = 0;

		/* the first of each kind is not counted: it finds the memory of the others in the caches */
		for (long i = 0; i <= n; i++) {
			if (ioctl(fd, TEST_CMD, &cmd))
				fail("ACCESS_RW");
			if (i == 0)
				start = now();
		}
		in[r] = (double)(now() - start) / n;
		cmd.flags = 1;
		for (long i = 0; i <= n; i++) {
			if (ioctl(fd, TEST_CMD, &cmd))
				fail("ACCESS_RW");
			if (i == 0)
				start = now();
		}
		out[r] = (double)(now() - start) / n;
		for (long i = 0; i <= n; i++) {
			if (process_vm_readv(child, &ours, 1, &from, 1, 0) != LENGTH ||
			    process_vm_writev(child, &ours, 1, &to, 1, 0) != LENGTH)
				fail("process_vm_readv and writev");
			if (i == 0)
				start = now();
		}
		moved[r] = (double)(now() - start) / n;
	}
	close(both[1]);
	waitpid(child, NULL, 0);
	printf("rw-read %.0f\nrw-write %.0f\nprocess-vm %.0f\n", median(in, ROUNDS), median(out, ROUNDS),
	       median(moved, ROUNDS));
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	long n = argc > 2 ? atol(argv[2]) : 300;

	if (!strcmp(what, "memory")) {
		heap(n);
		return 0;
	}
	fd = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail("/dev/iommu");
	if (!strcmp(what, "call"))
		calls(n);
	else if (!strcmp(what, "alloc"))
		allocs(n);
	else if (!strcmp(what, "map"))
		maps(n, 0);
	else if (!strcmp(what, "map-domain"))
		maps(n, 1);
	else if (!strcmp(what, "map-large"))
		large(n);
	else if (!strcmp(what, "map-areas"))
		areas(n, argc > 3 ? atol(argv[3]) : 100, 0);
	else if (!strcmp(what, "map-areas-domain"))
		areas(n, argc > 3 ? atol(argv[3]) : 100, 1);
	else if (!strcmp(what, "dirty"))
		dirty(n);
	else if (!strcmp(what, "rw"))
		rw(n);
	else {
		fprintf(stderr, "usage: loop call|alloc|map|map-domain|map-large|map-areas|map-areas-domain|dirty|rw|memory [N [M]]\n");
		return 2;
	}
	return 0;
}
