/* The yardsticks of benchmarks/moving.py and benchmarks/filling.py; see moves.c. */
#ifndef BENCH_MOVES_H
#define BENCH_MOVES_H

#include <stddef.h>
#include <stdint.h>

/* All of these return nanoseconds, or -errno of the first call that failed. */
/* (dst, src, length), one ioctl each. */
int64_t moves_each(int uffd, const uint64_t (*moves)[3], size_t count);
int64_t moves_fill_by_copy(int uffd, uint64_t dst, const char *src, uint64_t length,
                           uint64_t piece);
int64_t moves_fill_by_read(int file, uint64_t dst, uint64_t length, uint64_t piece);
/* Reads one word of each page; what was read must not all be zero. */
int64_t moves_touch(uint64_t start, uint64_t length, int core);

/* Answers each fault with one MOVE of the aligned window around it, until `stop` is readable. */
int moves_answer(int uffd, int stop, uint64_t dst, uint64_t src, uint64_t window, int core);

/* Runs until *stop, so that other cores have to be told of every change of a mapping. */
void moves_run(const volatile int *stop, int core);

#endif
