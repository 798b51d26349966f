/*
 * Touching memory with a clock round each touch: what every client of the benchmarks does, in
 * whatever process, and the options that say how.
 *
 * Page k of the image must begin with the 64-bit number k + 1; each page that does not is counted
 * as wrong. Regions lie in the image one after the other; windows are the parts of it whose pages
 * are touched, each page once.
 */
#ifndef BENCH_TOUCHING_H
#define BENCH_TOUCHING_H

#include <stddef.h>
#include <stdint.h>

#define MAX_CORES 64

enum gap_kind { GAP_SLEEP, GAP_BUSY };

struct touch {
    volatile uint64_t *address;
    uint64_t expected;
    uint64_t latency; /* nanoseconds */
};

struct options {
    int sock;          /* -1: none */
    const char *image; /* NULL: none */
    uint64_t pages;
    uint64_t warm; /* how many of them are touched before the clock starts */
    uint64_t regions;
    uint64_t length; /* bytes of one region; 0: as many as are touched */
    uint64_t windows;
    uint64_t threads;
    uint64_t gap; /* nanoseconds between touches */
    enum gap_kind gap_kind;
    int sequential;
    int cores[MAX_CORES];
    size_t core_count;
    int handler_core; /* where threads that answer are to run; -1: anywhere */
    int checked; /* whether the pages have to hold what the image has */
};

/* Reads the command line; exits with 2 when it makes no sense. */
struct options parse_options(int argc, char **argv);

/* The pages of one window, and the bytes from one window to the next. */
uint64_t pages_per_window(const struct options *options);
uint64_t window_spacing(const struct options *options);

/* Lists the touches in the order in which they are made, for regions that begin at `bases`;
 * `touches` has room for options->pages. Returns their number. */
size_t list_touches(const struct options *options, char *const *bases, struct touch *touches);

/* Touches the first options->warm, with neither threads nor gaps; returns the wrong ones. */
uint64_t touch_warm(const struct options *options, struct touch *touches);

/* Touches the others, shared out among the threads, and adds the wrong ones to *wrong; returns
 * nanoseconds of wall time. */
uint64_t touch_timed(const struct options *options, struct touch *touches, size_t count,
                     uint64_t *wrong);

/* Writes what was seen of the timed ones as a line of JSON; `handler` is nanoseconds of somebody's
 * processor time. Returns its length, as snprintf does. */
size_t report(const struct options *options, const struct touch *touches, size_t count,
              uint64_t wall, uint64_t handler, uint64_t wrong, char *text, size_t capacity);

/* All of it, for memory that is answered without a handler's process: lists, touches, reports. */
size_t touch_and_report(const struct options *options, char *const *bases, char *text,
                        size_t capacity);

#endif
