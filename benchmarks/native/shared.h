/*
 * What both sides of a benchmark share: time, cores, the socket that carries the descriptor.
 */
#ifndef BENCH_SHARED_H
#define BENCH_SHARED_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define BENCH_PAGE 4096UL

/* Nanoseconds of CLOCK_MONOTONIC. */
static inline uint64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

/* Says what failed and errno on stderr, and exits with 1. */
_Noreturn void die(const char *what);

/* The number written in `text`; exits when it is none or above `largest`. */
uint64_t number(const char *text, uint64_t largest);

/* Memory, or the end of the program. Never freed: the programs are short. */
void *allocate(size_t count, size_t size);

/* Pins the calling thread to one core; a negative core leaves it where the kernel puts it. */
void pin(int core);

/* Parses "0" or "0,1" into cores; returns how many. */
size_t parse_cores(const char *text, int *cores, size_t capacity);

/* Sends one descriptor and a message over a connected Unix socket; both stay the caller's. */
void send_descriptor(int sock, int descriptor, const char *message, size_t length);

/* Receives one descriptor, the caller's from now on, and a message, which it terminates with 0. */
int receive_descriptor(int sock, char *message, size_t capacity);

/* The value at percentile `percent` of `count` sorted values. */
uint64_t percentile(const uint64_t *sorted, size_t count, double percent);

void sort_values(uint64_t *values, size_t count);

#endif
