/* SPDX-License-Identifier: GPL-3.0-or-later
 *
 * What runs in the lab's guests: a heartbeat, a canary in memory, workloads, and a port to ask them.
 *
 * Shell tools would do under hardware virtualisation; under emulation each fork costs milliseconds, which is
 * what we want to measure. Settings come from the kernel command line as lab.KEY=VALUE (see settings below).
 *
 * The port "lifeboat.record" gets one line for each thing that happened, with the guest's own clocks (ns):
 *     boot REAL | beat NUMBER MONOTONIC REAL | ack NUMBER REAL | canary SHA256 | cached BYTES | tree NUMBER
 *     dirty BYTES | commit NUMBER REAL | error WORKLOAD TEXT
 * An "ack N" is written only after fsync of record N has returned on every disk. The same acks go to
 * lab.collector by TCP, the beats by UDP, as far as there is a network.
 *
 * The port "lifeboat.control" takes lines: canary | status | run SHELL COMMAND | poweroff; each answer ends
 * with a line holding a single dot.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST_DISKS 4
#define MOST_WORKLOADS 6
#define PAYLOAD_BYTES 480
#define PAGE_BYTES 4096
/* Every workload ends by itself: nobody may be there any more to end it. */
#define MOST_RECORDS 1000000

static char command_line[4096];
static int record_port = -1;
static pid_t workloads[MOST_WORKLOADS];
static int workload_count;
static struct shared {
	volatile uint64_t beats, records, dirty_bytes, trees, cached_bytes, errors;
} *shared;

/* One record of the log on disk; `lifeboat_lab/guests/records.py` reads the same. */
struct record {
	char magic[8];
	uint64_t number;
	uint64_t real_ns;
	uint32_t payload_bytes;
	uint32_t checksum; /* CRC-32 of the payload */
	uint8_t payload[PAYLOAD_BYTES];
};
_Static_assert(sizeof(struct record) == 512, "a record is one sector");

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;
	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static const char *setting(const char *key, const char *otherwise)
{
	static char values[8][256];
	static int turn;
	char wanted[64];
	snprintf(wanted, sizeof wanted, "lab.%s=", key);
	for (const char *at = command_line; at && *at; at = strchr(at, ' ')) {
		at += *at == ' ';
		if (strncmp(at, wanted, strlen(wanted)) == 0) {
			char *value = values[turn = (turn + 1) % 8];
			snprintf(value, sizeof values[0], "%s", at + strlen(wanted));
			value[strcspn(value, " \n")] = 0;
			return value;
		}
	}
	return otherwise;
}

static uint64_t number_setting(const char *key, uint64_t otherwise)
{
	const char *text = setting(key, NULL);
	return text ? strtoull(text, NULL, 10) : otherwise;
}

static int has_workload(const char *name)
{
	char list[256], *rest = list, *word;
	snprintf(list, sizeof list, "%s", setting("workload", "idle"));
	while ((word = strsep(&rest, ",")))
		if (strcmp(word, name) == 0)
			return 1;
	return 0;
}

static void tell(const char *format, ...)
{
	char line[512];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line - 1, format, arguments);
	va_end(arguments);
	line[length++] = '\n';
	if (record_port >= 0 && write(record_port, line, (size_t)length) != length)
		shared->errors++;
}

static void fail(const char *workload, const char *what)
{
	shared->errors++;
	tell("error %s %s: %s", workload, what, strerror(errno));
	_exit(1);
}

static void sleep_until(uint64_t when_ns)
{
	struct timespec when = {(time_t)(when_ns / 1000000000u), (long)(when_ns % 1000000000u)};
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR)
		;
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static uint32_t crc32_of(const uint8_t *data, size_t length)
{
	uint32_t crc = 0xffffffffu;
	for (size_t i = 0; i < length; i++) {
		crc ^= data[i];
		for (int bit = 0; bit < 8; bit++)
			crc = (crc >> 1) ^ (0xedb88320u & -(crc & 1u));
	}
	return ~crc;
}

/* A port of the virtio console by the name that the host gave it; -1 when the host has none. */
static int open_port(const char *name, int flags)
{
	const char *class = "/sys/class/virtio-ports";
	DIR *directory = opendir(class);
	struct dirent *entry;
	int port = -1;
	while (directory && port < 0 && (entry = readdir(directory))) {
		char path[512], found[128] = "";
		snprintf(path, sizeof path, "%s/%s/name", class, entry->d_name);
		FILE *file = fopen(path, "r");
		if (!file)
			continue;
		if (fgets(found, sizeof found, file))
			found[strcspn(found, "\n")] = 0;
		fclose(file);
		if (strcmp(found, name) == 0) {
			snprintf(path, sizeof path, "/dev/%s", entry->d_name);
			port = open(path, flags | O_CLOEXEC);
		}
	}
	if (directory)
		closedir(directory);
	return port;
}

static int collector_address(struct sockaddr_in6 *address)
{
	const char *host = setting("collector", NULL);
	if (!host)
		return -1;
	memset(address, 0, sizeof *address);
	address->sin6_family = AF_INET6;
	address->sin6_port = htons((uint16_t)number_setting("collector_port", 7000));
	return inet_pton(AF_INET6, host, &address->sin6_addr) == 1 ? 0 : -1;
}

static void heartbeat(void)
{
	const uint64_t period_ns = number_setting("heartbeat_milliseconds", 20) * 1000000u;
	struct sockaddr_in6 collector;
	const int reachable = collector_address(&collector) == 0;
	const int out = socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	const char *tag = setting("tag", "-");
	uint64_t due = clock_ns(CLOCK_MONOTONIC);
	for (uint64_t number = 1;; number++) {
		char text[128];
		int length = snprintf(text, sizeof text, "%s beat %llu", tag, (unsigned long long)number);
		tell("beat %llu %llu %llu", (unsigned long long)number,
		     (unsigned long long)clock_ns(CLOCK_MONOTONIC), (unsigned long long)clock_ns(CLOCK_REALTIME));
		if (reachable) /* a datagram that cannot be sent is what the collector measures */
			(void)!sendto(out, text, (size_t)length, 0, (struct sockaddr *)&collector, sizeof collector);
		shared->beats = number;
		const uint64_t now = clock_ns(CLOCK_MONOTONIC);
		due = due + period_ns > now ? due + period_ns : now + period_ns;
		sleep_until(due);
	}
}

/* Best effort: the log must not wait for the network. A line goes out whole or not at all. */
static void acknowledge_by_tcp(uint64_t number)
{
	static int connection = -1;
	static uint64_t next_try;
	struct sockaddr_in6 collector;
	if (connection < 0) {
		const uint64_t now = clock_ns(CLOCK_MONOTONIC);
		if (now < next_try || collector_address(&collector) < 0)
			return;
		next_try = now + 1000000000u;
		connection = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
		if (connect(connection, (struct sockaddr *)&collector, sizeof collector) < 0 && errno != EINPROGRESS)
			goto broken;
	}
	struct pollfd ready = {connection, POLLOUT, 0};
	if (poll(&ready, 1, 0) == 1) {
		char text[128];
		int length = snprintf(text, sizeof text, "%s ack %llu\n", setting("tag", "-"),
				      (unsigned long long)number);
		if (send(connection, text, (size_t)length, MSG_NOSIGNAL) != length && errno != EAGAIN)
			goto broken;
	}
	return;
broken:
	close(connection);
	connection = -1;
}

/* Appends numbered records to a log on every disk, in the order of the disks. At every instant the number on
 * a later disk is that of the disk before it, or one less: a copy of the disks that breaks this was not taken
 * at one instant. */
static void fsync_log(void)
{
	const uint64_t rate = number_setting("records_per_second", 20);
	int logs[MOST_DISKS], count = 0;
	uint64_t number = MOST_RECORDS;
	for (int disk = 1; disk <= MOST_DISKS; disk++) {
		char path[64];
		snprintf(path, sizeof path, "/disk%d/log", disk);
		if (access(path, F_OK) < 0)
			break;
		strcat(path, "/records");
		const int log = open(path, O_RDWR | O_CREAT | O_APPEND, 0644);
		struct stat status;
		if (log < 0 || fstat(log, &status) < 0)
			fail("fsync-log", path);
		/* What a power cut left of the last record was never acknowledged; numbers go on from the shortest. */
		const uint64_t whole = (uint64_t)status.st_size / sizeof(struct record);
		number = whole < number ? whole : number;
		logs[count++] = log;
	}
	for (int i = 0; i < count; i++)
		if (ftruncate(logs[i], (off_t)(number * sizeof(struct record))) < 0)
			fail("fsync-log", "ftruncate");
	uint64_t due = clock_ns(CLOCK_MONOTONIC);
	while (count && ++number <= MOST_RECORDS) {
		struct record record = {.magic = "LBRECORD", .number = number, .payload_bytes = PAYLOAD_BYTES};
		uint64_t seed = number * 0x9e3779b97f4a7c15u;
		for (size_t i = 0; i < PAYLOAD_BYTES; i += 8) {
			const uint64_t word = next_random(&seed);
			memcpy(record.payload + i, &word, 8);
		}
		record.checksum = crc32_of(record.payload, PAYLOAD_BYTES);
		record.real_ns = clock_ns(CLOCK_REALTIME);
		for (int i = 0; i < count; i++) {
			if (write(logs[i], &record, sizeof record) != sizeof record)
				fail("fsync-log", "write");
			if (fsync(logs[i]) < 0)
				fail("fsync-log", "fsync");
		}
		tell("ack %llu %llu", (unsigned long long)number, (unsigned long long)clock_ns(CLOCK_REALTIME));
		acknowledge_by_tcp(number);
		shared->records = number;
		due += 1000000000u / rate;
		const uint64_t now = clock_ns(CLOCK_MONOTONIC);
		due = due > now ? due : now;
		sleep_until(due);
	}
}

static void dirty_ram(void)
{
	const uint64_t region = number_setting("dirty_mib", 32) << 20;
	const uint64_t slot_ns = 20000000u;
	const uint64_t pages = number_setting("dirty_mib_per_second", 10) * 256u;
	uint8_t *memory = mmap(NULL, region, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		fail("dirty-ram", "mmap");
	uint64_t seed = clock_ns(CLOCK_REALTIME) | 1, at = 0, owed = 0, due = clock_ns(CLOCK_MONOTONIC);
	for (uint64_t slot = 0;; slot++) {
		for (owed += pages * slot_ns; owed >= 1000000000u; owed -= 1000000000u) {
			uint64_t *page = (uint64_t *)(memory + at);
			for (size_t i = 0; i < PAGE_BYTES / 8; i++)
				page[i] = next_random(&seed);
			at = (at + PAGE_BYTES) % region;
			shared->dirty_bytes += PAGE_BYTES;
		}
		if (slot % 50 == 0)
			tell("dirty %llu", (unsigned long long)shared->dirty_bytes);
		const uint64_t now = clock_ns(CLOCK_MONOTONIC);
		due = due + slot_ns > now ? due + slot_ns : now;
		sleep_until(due);
	}
}

static uint64_t read_tree(const char *path)
{
	uint64_t total = 0;
	static char buffer[1 << 16];
	struct dirent *entry;
	DIR *directory = opendir(path);
	while (directory && (entry = readdir(directory))) {
		char below[1024];
		if (entry->d_name[0] == '.')
			continue;
		snprintf(below, sizeof below, "%s/%s", path, entry->d_name);
		if (entry->d_type == DT_DIR) {
			total += read_tree(below);
			continue;
		}
		const int file = open(below, O_RDONLY);
		ssize_t got;
		while (file >= 0 && (got = read(file, buffer, sizeof buffer)) > 0)
			total += (uint64_t)got;
		if (file >= 0)
			close(file);
	}
	if (directory)
		closedir(directory);
	return total;
}

/* Reads everything there is on the first disk, again and again, so that it stays in memory. */
static void page_cache(void)
{
	for (;;) {
		shared->cached_bytes = read_tree("/disk1/content");
		tell("cached %llu", (unsigned long long)shared->cached_bytes);
		sleep(5);
	}
}

/* Builds trees of small files and removes the one before the last, as unpacking and compiling do. */
static void file_tree(void)
{
	const uint64_t files_per_second = number_setting("files_per_second", 100);
	uint64_t due = clock_ns(CLOCK_MONOTONIC), seed = due | 1;
	static uint64_t content[32768 / 8];
	char path[256], final[256];
	if (mkdir("/disk1/tree", 0755) < 0 && errno != EEXIST)
		fail("file-tree", "mkdir");
	for (uint64_t tree = 1;; tree++) {
		snprintf(path, sizeof path, "/disk1/tree/.%llu", (unsigned long long)tree);
		char command[1200];
		snprintf(command, sizeof command, "rm -rf %s", path);
		if (system(command) != 0 || mkdir(path, 0755) < 0)
			fail("file-tree", "mkdir");
		for (int directory = 0; directory < 10; directory++) {
			snprintf(path, sizeof path, "/disk1/tree/.%llu/d%d", (unsigned long long)tree, directory);
			if (mkdir(path, 0755) < 0)
				fail("file-tree", "mkdir");
			for (int number = 0; number < 20; number++) {
				const size_t length = 512 + next_random(&seed) % 32000;
				for (size_t i = 0; i < length / 8; i++)
					content[i] = next_random(&seed);
				snprintf(path, sizeof path, "/disk1/tree/.%llu/d%d/f%d",
					 (unsigned long long)tree, directory, number);
				const int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
				if (file < 0 || write(file, content, length) != (ssize_t)length || close(file) < 0)
					fail("file-tree", "write");
				due += 1000000000u / files_per_second;
				const uint64_t now = clock_ns(CLOCK_MONOTONIC);
				due = due > now ? due : now;
				sleep_until(due);
			}
		}
		snprintf(path, sizeof path, "/disk1/tree/.%llu", (unsigned long long)tree);
		snprintf(final, sizeof final, "/disk1/tree/%llu", (unsigned long long)tree);
		snprintf(command, sizeof command, "rm -rf %s && mv %s %s && rm -rf /disk1/tree/%llu", final, path, final,
			 (unsigned long long)(tree > 2 ? tree - 2 : 0));
		if (system(command) != 0)
			fail("file-tree", "rename");
		shared->trees = tree;
		tell("tree %llu", (unsigned long long)tree);
	}
}

/* In the Debian guest only: SQLite, as its own program, telling on our port. */
static void database(void)
{
	char port[16];
	snprintf(port, sizeof port, "%d", dup(record_port)); /* the copy survives exec */
	setenv("LAB_RECORD_FD", port, 1);
	setenv("LAB_COMMITS_PER_SECOND", setting("records_per_second", "20"), 1);
	execl("/usr/local/lib/lab/database", "database", (char *)NULL);
	fail("database", "exec");
}

static void print_output(FILE *answer, const char *command)
{
	char line[512];
	FILE *output = popen(command, "r");
	while (output && fgets(line, sizeof line, output))
		fputs(line, answer);
	if (output)
		pclose(output);
}

static void end_workloads(void)
{
	for (int i = 0; i < workload_count; i++) {
		kill(workloads[i], SIGKILL);
		waitpid(workloads[i], NULL, 0);
	}
}

static void answer_command(char *command, int port)
{
	char *text = NULL;
	size_t length = 0;
	FILE *answer = open_memstream(&text, &length);
	if (strcmp(command, "canary") == 0)
		print_output(answer, "sha256sum < /canary/random | cut -d' ' -f1");
	else if (strcmp(command, "status") == 0)
		fprintf(answer, "beats %llu\nrecords %llu\ndirty_bytes %llu\ntrees %llu\ncached_bytes %llu\nerrors %llu\n",
			(unsigned long long)shared->beats, (unsigned long long)shared->records,
			(unsigned long long)shared->dirty_bytes, (unsigned long long)shared->trees,
			(unsigned long long)shared->cached_bytes, (unsigned long long)shared->errors);
	else if (strncmp(command, "run ", 4) == 0)
		print_output(answer, command + 4);
	else if (strcmp(command, "poweroff") == 0) {
		/* The kernel resets its disks before the power is off: who writes still would tell of an error. */
		end_workloads();
		sync();
		reboot(RB_POWER_OFF);
	} else
		fprintf(answer, "unknown command: canary, status, run COMMAND or poweroff\n");
	fprintf(answer, ".\n");
	fclose(answer);
	for (size_t done = 0; done < length;) {
		const ssize_t written = write(port, text + done, length - done);
		if (written <= 0)
			break;
		done += (size_t)written;
	}
	free(text);
}

static void serve(void)
{
	const int port = open_port("lifeboat.control", O_RDWR);
	char line[1024];
	size_t have = 0;
	for (;;) {
		char byte;
		const ssize_t got = port < 0 ? -1 : read(port, &byte, 1);
		if (got != 1) { /* nobody is connected at the host's end */
			have = 0;
			usleep(100000);
			while (waitpid(-1, NULL, WNOHANG) > 0)
				;
		} else if (byte == '\n') {
			line[have] = 0;
			have = 0;
			answer_command(line, port);
		} else if (have < sizeof line - 1)
			line[have++] = byte;
	}
}

static void start(const char *workload, void (*body)(void))
{
	if (strcmp(workload, "heartbeat") != 0 && !has_workload(workload))
		return;
	const pid_t child = fork();
	if (child == 0) {
		body();
		_exit(0);
	}
	if (child > 0 && workload_count < MOST_WORKLOADS)
		workloads[workload_count++] = child;
}

int main(void)
{
	const int file = open("/proc/cmdline", O_RDONLY);
	if (file < 0 || read(file, command_line, sizeof command_line - 1) < 0)
		return 1;
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	record_port = open_port("lifeboat.record", O_WRONLY);
	tell("boot %llu", (unsigned long long)clock_ns(CLOCK_REALTIME));
	start("heartbeat", heartbeat);
	start("fsync-log", fsync_log);
	start("dirty-ram", dirty_ram);
	start("page-cache", page_cache);
	start("file-tree", file_tree);
	start("database", database);
	char command[256], digest[128] = "";
	snprintf(command, sizeof command,
		 "head -c %llu /dev/urandom > /canary/random && sha256sum < /canary/random | cut -d' ' -f1",
		 (unsigned long long)number_setting("canary_mib", 4) << 20);
	FILE *output = popen(command, "r");
	if (output && fgets(digest, sizeof digest, output))
		digest[strcspn(digest, "\n")] = 0;
	if (output)
		pclose(output);
	tell("canary %s", digest);
	serve();
}
