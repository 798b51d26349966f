/*
 * The toucher as a shared library, for benchmarks/in_process.py and benchmarks/forwarding.py:
 * called through ctypes, which lets go of the GIL.
 */
#define _GNU_SOURCE
#include "shared.h"
#include "touching.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Touches memory at `start` as the toucher's options say, in this thread, which it pins; writes
 * the JSON to `text` and returns its length. */
size_t in_process_touch(uint64_t start, int argc, char **argv, char *text, size_t capacity);

/* Lists the numbers of the pages in the toucher's order. */
size_t in_process_order(int argc, char **argv, uint64_t *pages);

/* Reads a word of each page and discards them all, so many times; 0 or -errno. */
int in_process_again(uint64_t start, uint64_t length, uint64_t times);

size_t in_process_touch(uint64_t start, int argc, char **argv, char *text, size_t capacity)
{
    struct options options = parse_options(argc, argv);
    char *base = (char *)(uintptr_t)start;
    options.checked = 1;
    pin(options.core_count ? options.cores[0] : -1);
    return touch_and_report(&options, &base, text, capacity);
}

size_t in_process_order(int argc, char **argv, uint64_t *pages)
{
    const struct options options = parse_options(argc, argv);
    struct touch *touches = allocate(options.pages, sizeof *touches);
    char *base = NULL;
    size_t count = list_touches(&options, &base, touches);
    for (size_t index = 0; index < count; index++) {
        pages[index] = touches[index].expected - 1;
    }
    free(touches);
    return count;
}

int in_process_again(uint64_t start, uint64_t length, uint64_t times)
{
    char *base = (char *)(uintptr_t)start;
    for (uint64_t round = 0; round < times; round++) {
        for (uint64_t offset = 0; offset < length; offset += BENCH_PAGE) {
            (void)*(volatile uint64_t *)(void *)(base + offset);
        }
        if (madvise(base, length, MADV_DONTNEED) != 0) {
            return -errno;
        }
    }
    return 0;
}
