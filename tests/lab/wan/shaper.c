/* SPDX-License-Identifier: GPL-3.0-or-later
 *
 * The inner loop of the WAN: takes packets from one TUN device per site, holds each for its turn on the line and
 * its delay, and writes it back. Loaded by lifeboat_lab/shaper.py; in C because the two processors that a lab has
 * must be left to the hosts (in Python the same loop took a third of one at 400 Mbit/s).
 *
 * All times are seconds of CLOCK_MONOTONIC. shaper_offer and shaper_take take the clock as an argument, so that
 * rate, queue and order can be tested without waiting.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define MOST_SITES 8
#define PREFIX_BYTES 6
#define IPV4_PREFIX_BYTES 3
/* struct virtio_net_hdr: what kind of segmentation is still to be done, of what payload each, where TCP begins. */
#define VNET_HEADER_BYTES 10
#define GSO_TYPE_AT 1
#define GSO_SIZE_AT 4
#define TCP_START_AT 6
#define GSO_TCPV4 1
#define GSO_TCPV6 4
#define GSO_ECN 0x80
#define DESTINATION_AT (VNET_HEADER_BYTES + 24)
#define IPV4_DESTINATION_AT (VNET_HEADER_BYTES + 16)
/* Of TCP's header, in words of four bytes, in the upper half of this byte. */
#define TCP_LENGTH_AT 12
#define LARGEST_PACKET_BYTES (65536 + 128)
/* Packets read from one device before those that are due are looked at again. */
#define BATCH 32
/* Packets that are due this soon go out in one turn: waking up takes about as long as that. Both ways together a round
 * trip is short by at most twice this, a hundredth of the shortest profile's. */
#define EARLY_SECONDS 0.00005
/* A path without a rate limit still may not hold more than this in memory. */
#define IN_FLIGHT_LIMIT_BYTES (256u << 20)

struct packet {
	struct packet *next;
	double due;
	size_t length;
	uint8_t data[];
};

struct counters {
	uint64_t delivered_bytes, delivered_packets, dropped_queue_full, dropped_loss, dropped_cut;
};

struct path {
	struct packet *first, *last;
	size_t held_bytes;
	double line_free_at, last_due;
	struct counters counters;
};

struct shaper {
	int sites;
	int device[MOST_SITES];
	uint8_t prefix[MOST_SITES][PREFIX_BYTES], ipv4_prefix[MOST_SITES][IPV4_PREFIX_BYTES];
	double bytes_per_second, delay_seconds, loss, queue_bytes;
	uint64_t random;
	struct path path[MOST_SITES][MOST_SITES];
	uint8_t buffer[LARGEST_PACKET_BYTES];
};

static double now_seconds(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static double random_share(struct shaper *shaper)
{
	shaper->random ^= shaper->random << 13;
	shaper->random ^= shaper->random >> 7;
	shaper->random ^= shaper->random << 17;
	return (double)(shaper->random >> 11) / 9007199254740992.0;
}

struct shaper *shaper_new(uint64_t seed)
{
	struct shaper *shaper = calloc(1, sizeof *shaper);
	if (shaper)
		shaper->random = (seed * 0x9e3779b97f4a7c15u) | 1;
	return shaper;
}

int shaper_add_site(struct shaper *shaper, int device, const uint8_t *prefix, const uint8_t *ipv4_prefix)
{
	if (shaper->sites == MOST_SITES)
		return -1;
	shaper->device[shaper->sites] = device;
	memcpy(shaper->prefix[shaper->sites], prefix, PREFIX_BYTES);
	memcpy(shaper->ipv4_prefix[shaper->sites], ipv4_prefix, IPV4_PREFIX_BYTES);
	return shaper->sites++;
}

/* bytes_per_second 0: no limit. delay_seconds is one way. */
void shaper_set(struct shaper *shaper, double bytes_per_second, double delay_seconds, double loss,
		double queue_bytes)
{
	shaper->bytes_per_second = bytes_per_second;
	shaper->delay_seconds = delay_seconds;
	shaper->loss = loss;
	shaper->queue_bytes = queue_bytes;
}

static size_t number_at(const uint8_t *data, size_t at)
{
	uint16_t number; /* in this machine's order of bytes, as TUN devices have it */
	memcpy(&number, data + at, sizeof number);
	return number;
}

/* Bytes on the line: a packet that the kernel has not split yet would be many, each with headers of its own. */
static size_t size_on_line(const uint8_t *data, size_t length)
{
	const size_t bytes = length - VNET_HEADER_BYTES, payload = number_at(data, GSO_SIZE_AT);
	const size_t tcp = number_at(data, TCP_START_AT);
	const uint8_t type = data[GSO_TYPE_AT] & (uint8_t)~GSO_ECN;
	if ((type != GSO_TCPV4 && type != GSO_TCPV6) || payload == 0 || tcp + TCP_LENGTH_AT >= bytes)
		return bytes;
	const size_t headers = tcp + (size_t)(data[VNET_HEADER_BYTES + tcp + TCP_LENGTH_AT] >> 4) * 4;
	if (bytes <= headers)
		return bytes;
	const size_t segments = (bytes - headers + payload - 1) / payload;
	return bytes + (segments - 1) * headers;
}

/* Takes a packet in: 1, or 0 when it was dropped. */
int shaper_offer(struct shaper *shaper, int source, int destination, const uint8_t *data, size_t length, double now)
{
	struct path *path = &shaper->path[source][destination];
	const double size = (double)size_on_line(data, length), rate = shaper->bytes_per_second;
	if (shaper->loss > 0 && random_share(shaper) < shaper->loss) {
		path->counters.dropped_loss++;
		return 0;
	}
	double line_free_at = fmax(path->line_free_at, now);
	const int full = rate > 0 && (line_free_at - now) * rate + size > shaper->queue_bytes;
	struct packet *packet = NULL;
	if (!full && path->held_bytes + length <= IN_FLIGHT_LIMIT_BYTES)
		packet = malloc(sizeof *packet + length);
	if (!packet) {
		path->counters.dropped_queue_full++;
		return 0;
	}
	if (rate > 0)
		line_free_at += size / rate;
	path->line_free_at = line_free_at;
	/* A delay that was just shortened must not let this packet pass those that are on their way. */
	path->last_due = fmax(path->last_due, line_free_at + shaper->delay_seconds);
	packet->next = NULL;
	packet->due = path->last_due;
	packet->length = length;
	memcpy(packet->data, data, length);
	if (path->last)
		path->last->next = packet;
	else
		path->first = packet;
	path->last = packet;
	path->held_bytes += length;
	return 1;
}

static struct packet *take(struct path *path, double now)
{
	struct packet *packet = path->first;
	if (!packet || packet->due > now)
		return NULL;
	path->first = packet->next;
	if (!path->first)
		path->last = NULL;
	path->held_bytes -= packet->length;
	return packet;
}

/* The length of the next packet whose time has come, copied to `data` (LARGEST_PACKET_BYTES); 0 for none. */
size_t shaper_take(struct shaper *shaper, int source, int destination, uint8_t *data, double now)
{
	struct packet *packet = take(&shaper->path[source][destination], now);
	if (!packet)
		return 0;
	const size_t length = packet->length;
	memcpy(data, packet->data, length);
	free(packet);
	return length;
}

/* Loses everything that is on its way from source to destination, as a cut cable does. */
void shaper_clear(struct shaper *shaper, int source, int destination)
{
	struct path *path = &shaper->path[source][destination];
	for (struct packet *packet; (packet = take(path, INFINITY)); free(packet))
		path->counters.dropped_cut++;
	path->line_free_at = path->last_due = 0;
}

void shaper_counters(const struct shaper *shaper, int source, int destination, struct counters *counters)
{
	*counters = shaper->path[source][destination].counters;
}

static int is_for(const struct shaper *shaper, int site)
{
	const uint8_t *packet = shaper->buffer;
	if (packet[VNET_HEADER_BYTES] >> 4 == 4)
		return memcmp(packet + IPV4_DESTINATION_AT, shaper->ipv4_prefix[site], IPV4_PREFIX_BYTES) == 0;
	return memcmp(packet + DESTINATION_AT, shaper->prefix[site], PREFIX_BYTES) == 0;
}

static void take_in(struct shaper *shaper, int source)
{
	for (int i = 0; i < BATCH; i++) {
		const ssize_t length = read(shaper->device[source], shaper->buffer, sizeof shaper->buffer);
		if (length < IPV4_DESTINATION_AT + 4 ||
		    (shaper->buffer[VNET_HEADER_BYTES] >> 4 != 4 && length < DESTINATION_AT + 16)) {
			if (length < 0)
				return; /* nothing more, or the device is gone */
			continue;
		}
		for (int destination = 0; destination < shaper->sites; destination++)
			if (destination != source && is_for(shaper, destination))
				shaper_offer(shaper, source, destination, shaper->buffer, (size_t)length,
					     now_seconds());
	}
}

/* Writes what is due and returns when the next packet will be. */
static double give_out(struct shaper *shaper)
{
	double next = INFINITY;
	const double until = now_seconds() + EARLY_SECONDS;
	for (int source = 0; source < shaper->sites; source++)
		for (int destination = 0; destination < shaper->sites; destination++) {
			struct path *path = &shaper->path[source][destination];
			for (struct packet *packet; (packet = take(path, until)); free(packet))
				/* What the kernel refuses, or has no room for, is a packet lost as on any WAN. */
				if (write(shaper->device[source], packet->data, packet->length) > 0) {
					path->counters.delivered_bytes += size_on_line(packet->data, packet->length);
					path->counters.delivered_packets++;
				}
			if (path->first)
				next = fmin(next, path->first->due);
		}
	return next;
}

/* Relays until `control` can be read (1), `until` has come (0) or a signal has (-1). */
int shaper_run(struct shaper *shaper, int control, double until)
{
	struct pollfd ready[MOST_SITES + 1] = {{control, POLLIN, 0}};
	prctl(PR_SET_TIMERSLACK, 1);
	for (int site = 0; site < shaper->sites; site++)
		ready[site + 1] = (struct pollfd){shaper->device[site], POLLIN, 0};
	for (;;) {
		const double next = fmin(give_out(shaper), until), now = now_seconds();
		if (now >= until)
			return 0;
		const double wait = fmin(fmax(next - EARLY_SECONDS / 2 - now, 0), 3600);
		struct timespec timeout = {(time_t)wait, (long)((wait - floor(wait)) * 1e9)};
		if (ppoll(ready, (nfds_t)shaper->sites + 1, &timeout, NULL) < 0)
			return -1;
		if (ready[0].revents)
			return 1;
		for (int site = 0; site < shaper->sites; site++)
			if (ready[site + 1].revents)
				take_in(shaper, site);
	}
}
