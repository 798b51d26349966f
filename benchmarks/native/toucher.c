/*
 * The client: maps memory, registers it with a userfaultfd, hands the descriptor and a line of
 * JSON ({"regions": [[start, length], ...], "windows": [[offset, length], ...]}) over --socket,
 * waits for "go PID", touches pages, and writes what it saw as JSON.
 *
 * Without --socket nothing is registered: the kernel's own anonymous fault, or with --image its
 * fault in a mapped file, of whatever filesystem.
 */
#define _GNU_SOURCE
#include "client.h"
#include "shared.h"

#include <stdio.h>

static uint64_t used_by(const struct options *options, clockid_t clock)
{
    struct timespec used = {0};
    if (options->sock >= 0 && clock_gettime(clock, &used) != 0) {
        die("clock_gettime");
    }
    return (uint64_t)used.tv_sec * 1000000000ULL + (uint64_t)used.tv_nsec;
}

int main(int argc, char **argv)
{
    const struct options options = parse_options(argc, argv);
    pin(options.core_count ? options.cores[0] : -1);
    struct touch *touches = allocate(options.pages, sizeof *touches);
    char **bases = allocate(options.regions, sizeof *bases);
    char *text = allocate(MAX_TEXT, 1);
    if (options.image != NULL) {
        map_file(&options, bases);
    } else {
        prepare(&options, bases, text);
    }
    size_t count = list_touches(&options, bases, touches);
    clockid_t clock = CLOCK_PROCESS_CPUTIME_ID;
    if (options.sock >= 0) {
        clock = hand_over(&options, bases, text);
    }
    uint64_t wrong = touch_warm(&options, touches);
    uint64_t before = used_by(&options, clock);
    uint64_t wall = touch_timed(&options, touches, count, &wrong);
    uint64_t handler = used_by(&options, clock) - before;
    report(&options, touches, count, wall, handler, wrong, text, MAX_TEXT);
    fputs(text, stdout);
    return 0;
}
